"""MinHash signatures (Broder 1997): how alike two documents are, from a few numbers of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from deepseek_v3.data.arrays import Int64Array, UInt32Array, UInt64Array
from deepseek_v3.data.deduplication.case_folding import fold_case
from deepseek_v3.data.deduplication.hashing import odd_multipliers, shingle_multipliers
from deepseek_v3.data.deduplication.kernels.select import select_kernels
from deepseek_v3.data.deduplication.utf8 import text_blocks


class Shingles(NamedTuple):
    """`hashes` (uint32, never 0): document d has those from `offsets[d]` to `offsets[d + 1]` (int64)."""

    hashes: UInt32Array
    offsets: Int64Array


@dataclass(frozen=True)
class MinHasher:
    """Makes shingles and signatures of documents.

    Value p of a signature is the least product h * a[p] mod 2^32 of any hash h of the document's shingles with a
    random odd multiplier a[p]. The probability that two documents agree in a value is their Jaccard similarity.

    A summand b[p], as in the usual (a h + b), would change nothing: hashes are as good as random, and none is 0,
    which would be the least under every multiplier.
    """

    num_perm: int
    ngram: int
    seed: int
    accelerator: str

    def __post_init__(self) -> None:
        if self.accelerator == "numba":
            select_kernels(self.accelerator)

    def shingles(self, texts: pa.Array) -> Iterator[Shingles]:
        """The shingles of runs of documents, which together are all of them."""
        shingle_hashes = select_kernels(self.accelerator).shingle_hashes
        multipliers = shingle_multipliers(self.ngram)
        for text, offsets in text_blocks(texts):
            yield Shingles(*shingle_hashes(fold_case(text, offsets), offsets, multipliers))

    def signatures(self, shingles: Shingles) -> UInt32Array:
        """uint32 [documents, num_perm]; all 2^32 - 1 for a document without words."""
        multipliers = odd_multipliers(self.seed, self.num_perm)
        return select_kernels(self.accelerator).minhash_signatures(*shingles, multipliers)

    def intersection_sizes(
        self, sets: UInt64Array, offsets: Int64Array, one: Int64Array, other: Int64Array
    ) -> Int64Array:
        """How many members two sets have in common, for pairs of sets: int64 [pairs].

        Set s stands, ascending and without repeats, from `offsets[s]` to `offsets[s + 1]`; the lower 32 bits count.
        """
        return select_kernels(self.accelerator).intersection_sizes(sets, offsets, one, other)

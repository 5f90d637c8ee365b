"""MinHash signatures (Broder 1997): a few numbers per document that estimate Jaccard similarities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from deepseek_v3.data.arrays import BoolArray, Int64Array, UInt32Array, UInt64Array
from deepseek_v3.data.deduplication.case_folding import fold_case
from deepseek_v3.data.deduplication.hashing import odd_multipliers, shingle_multipliers
from deepseek_v3.data.deduplication.kernels.select import select_kernels
from deepseek_v3.data.deduplication.utf8 import text_blocks


class Shingles(NamedTuple):
    """The shingle hashes of documents: `hashes` (uint32, never 0) and `offsets` (int64 [documents + 1]).

    Document d has the hashes from `offsets[d]` to `offsets[d + 1] - 1`.
    """

    hashes: UInt32Array
    offsets: Int64Array


@dataclass(frozen=True)
class MinHasher:
    """Computes shingles and MinHash signatures of documents.

    Value p of a signature is the minimum of h * a[p] mod 2^32 over all shingle hashes h of the document; a[p] is a
    random odd multiplier. The probability that two documents agree in a value is their Jaccard similarity. The
    usual summand b[p] of (a h + b) is not needed: the hashes are already random, and none is 0, which would be the
    minimum under every multiplier.

    `num_perm` is the number of values, `ngram` the words of a shingle, `accelerator` the kernels' back end (`auto`,
    `numpy` or `numba`). Raises DataError if `numba` is asked for and cannot be loaded.
    """

    num_perm: int
    ngram: int
    seed: int
    accelerator: str

    def __post_init__(self) -> None:
        if self.accelerator == "numba":
            select_kernels(self.accelerator)

    def shingles(self, texts: pa.Array, is_code: BoolArray | None = None) -> Iterator[Shingles]:
        """Yields the shingles of blocks of documents; `is_code` (bool [documents]) as in `fold_case`."""
        shingle_hashes = select_kernels(self.accelerator).shingle_hashes
        multipliers = shingle_multipliers(self.ngram)
        first = 0
        for text, offsets in text_blocks(texts):
            block = slice(first, first + len(offsets) - 1)
            folded = fold_case(text, offsets, None if is_code is None else is_code[block])
            yield Shingles(*shingle_hashes(folded, offsets, multipliers))
            first = block.stop

    def signatures(self, shingles: Shingles) -> UInt32Array:
        """Returns the signatures: uint32 [documents, num_perm]; all 2^32 - 1 for a document without words."""
        multipliers = odd_multipliers(self.seed, self.num_perm)
        return select_kernels(self.accelerator).minhash_signatures(*shingles, multipliers)

    def intersection_sizes(
        self, sets: UInt64Array, offsets: Int64Array, one: Int64Array, other: Int64Array
    ) -> Int64Array:
        """Returns the sizes of the intersections of pairs of sets: int64 [pairs].

        Set s is `sets[offsets[s] : offsets[s + 1]]`, ascending and without repeats; only the lower 32 bits of each
        member count.
        """
        return select_kernels(self.accelerator).intersection_sizes(sets, offsets, one, other)

"""MinHash signatures (Broder 1997): how alike two documents are, from a few numbers of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import pyarrow as pa

from deepseek_v3.data.deduplication import numpy_kernels
from deepseek_v3.data.deduplication.folding import fold
from deepseek_v3.data.deduplication.hashing import odd_multipliers, shingle_multipliers
from deepseek_v3.data.deduplication.utf8 import Int64s, UInt32s, blocks
from deepseek_v3.utils.errors import DataError

_PACKAGE = __name__.rpartition(".")[0]


class Shingles(NamedTuple):
    """`hashes` (uint32, never 0): document d has those from `offsets[d]` to `offsets[d + 1]` (int64)."""

    hashes: UInt32s
    offsets: Int64s


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
            _kernels(self.accelerator)

    def shingles(self, texts: pa.Array) -> Iterator[Shingles]:
        """The shingles of runs of documents, which together are all of them."""
        kernels = _kernels(self.accelerator)
        multipliers = shingle_multipliers(self.ngram)
        for text, offsets in blocks(texts):
            yield Shingles(*kernels.shingle_hashes(fold(text, offsets), offsets, multipliers))

    def signatures(self, shingles: Shingles) -> UInt32s:
        """uint32 [documents, num_perm]; all 2^32 - 1 for a document without words."""
        multipliers = odd_multipliers(self.seed, self.num_perm)
        return _kernels(self.accelerator).minima(*shingles, multipliers)


@lru_cache(maxsize=3)
def _kernels(accelerator: str) -> ModuleType:
    """The module with the two loops that cost the time. Raises DataError if Numba is asked for and missing."""
    if accelerator != "numpy":
        try:
            return import_module(f"{_PACKAGE}.numba_kernels")
        except ImportError as error:
            if accelerator == "numba":
                raise DataError(
                    f"accelerator: numba cannot be loaded: {error}; run pip install 'deepseek_v3[numba]', or take "
                    "numpy, which gives the same results"
                ) from None
    return numpy_kernels

"""Constants and random multipliers of the hashes of deduplication."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from deepseek_v3.data.arrays import UInt32Array, UInt64Array

MIX_32 = 0x85EBCA6B  # MurmurHash3 (Appleby 2011)
_SHINGLE_SEED = 2**32 + 5  # outside the range of seeds for signatures


def random_bits(seed: int, count: int) -> UInt64Array:
    """Returns random numbers that are the same in every version of NumPy: uint64 [count]."""
    return np.random.PCG64(seed).random_raw(count)


@lru_cache(maxsize=8)
def odd_multipliers(seed: int, count: int) -> UInt32Array:
    """Returns random odd numbers: uint32 [count].

    Each process computes them anew, because Numba rejects the read-only arrays that Ray sends.
    """
    return (random_bits(seed, count) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def shingle_multipliers(ngram: int) -> UInt32Array:
    """Returns the multiplier of each word position in a shingle: uint32 [ngram]."""
    return odd_multipliers(_SHINGLE_SEED, ngram)

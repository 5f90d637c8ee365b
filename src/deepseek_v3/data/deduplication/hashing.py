"""The constants and the small functions that all hashes here are made of."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from deepseek_v3.data.arrays import UInt32Array, UInt64Array

MIX_32 = 0x85EBCA6B  # MurmurHash3 (Appleby 2011)
_SHINGLE_SEED = 2**32 + 5  # no seed of permutations


def random_bits(seed: int, count: int) -> UInt64Array:
    """Numbers that depend on the seed alone, under every version of NumPy: uint64 [count]."""
    return np.random.PCG64(seed).random_raw(count)


@lru_cache(maxsize=8)
def odd_multipliers(seed: int, count: int) -> UInt32Array:
    """Random odd numbers: uint32 [count]. They are made in each process, for Numba takes no arrays sent by Ray."""
    return (random_bits(seed, count) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def shingle_multipliers(ngram: int) -> UInt32Array:
    """A multiplier for each place in a shingle: uint32 [ngram]."""
    return odd_multipliers(_SHINGLE_SEED, ngram)

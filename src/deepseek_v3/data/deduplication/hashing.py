"""The constants and the small functions that all hashes here are made of."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from deepseek_v3.data.deduplication.utf8 import UInt32s, UInt64s

# SplitMix64 (Steele et al. 2014) and MurmurHash3 (Appleby 2011).
STEP = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MIX_32 = 0x85EBCA6B
_SHINGLE_SEED = 2**32 + 5  # no seed of permutations


def random_bits(seed: int, count: int) -> UInt64s:
    """Numbers that depend on the seed alone, under every version of NumPy: uint64 [count]."""
    return np.random.PCG64(seed).random_raw(count)


@lru_cache(maxsize=8)
def odd_multipliers(seed: int, count: int) -> UInt32s:
    """Random odd numbers: uint32 [count]. They are made in each process, for Numba takes no arrays sent by Ray."""
    return (random_bits(seed, count) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def shingle_multipliers(ngram: int) -> UInt32s:
    """A multiplier for each place in a shingle: uint32 [ngram]."""
    return odd_multipliers(_SHINGLE_SEED, ngram)


def mixed(values: UInt64s) -> UInt64s:
    """SplitMix64's finaliser, one to one: every bit of the input reaches every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX_2)
    return values ^ (values >> np.uint64(31))

"""NumPy array types, and the operations on 64-bit integers that several data stages share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

BoolArray: TypeAlias = NDArray[np.bool_]
UInt8Array: TypeAlias = NDArray[np.uint8]
Int32Array: TypeAlias = NDArray[np.int32]
UInt32Array: TypeAlias = NDArray[np.uint32]
Int64Array: TypeAlias = NDArray[np.int64]
UInt64Array: TypeAlias = NDArray[np.uint64]
Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]

# SplitMix64 (Steele et al. 2014): the increment of its state, and the multipliers of its finalizer.
SPLITMIX64_GAMMA = 0x9E3779B97F4A7C15
SPLITMIX64_MIX_1 = 0xBF58476D1CE4E5B9
SPLITMIX64_MIX_2 = 0x94D049BB133111EB


def mix64(values: UInt64Array) -> UInt64Array:
    """Applies the finalizer of SplitMix64, a bijection: every bit of the input affects every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(SPLITMIX64_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(SPLITMIX64_MIX_2)
    return values ^ (values >> np.uint64(31))


def find_sorted(keys: NDArray[Any], wanted: NDArray[Any]) -> Int64Array:
    """The last index of each wanted number in the ascending array `keys`, or -1 where it is absent: int64 [n]."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    # Unique numbers in ascending order make the binary searches walk through memory instead of jumping.
    different, places = np.unique(wanted, return_inverse=True)
    rows = np.searchsorted(keys, different, side="right") - 1
    return np.where(keys[rows] == different, rows, -1)[places]

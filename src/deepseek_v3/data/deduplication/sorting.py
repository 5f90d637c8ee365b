"""Equal keys of 64 bits, found by sorting."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deepseek_v3.data.deduplication.utf8 import Int64s, UInt64s


class Groups(NamedTuple):
    """Places in an array of keys, by key and then in order; equal keys have the same number of `groups`."""

    places: Int64s
    groups: Int64s


def grouped(keys: UInt64s) -> Groups:
    """All places of the keys.

    The keys are sorted by an unstable sort, which in NumPy is many times as fast as a stable one, and then groups
    and places together.
    """
    order = np.argsort(keys)
    ranked = keys[order]
    bits = max(len(keys), 1).bit_length()
    packed = np.cumsum(ranked[1:] != ranked[:-1])
    packed = np.append(np.zeros(min(len(keys), 1), np.int64), packed) << bits | order
    packed.sort()
    return Groups(packed & (1 << bits) - 1, packed >> bits)


def repeated(found: Groups) -> Groups:
    """Those places whose keys others have too."""
    same = found.groups[1:] == found.groups[:-1]
    kept = np.append(same, False) | np.append(False, same) if len(found.groups) else np.zeros(0, np.bool_)
    return Groups(found.places[kept], found.groups[kept])

"""The key files of a part: what the comparison has to know of its documents.

- `signatures.npy`: uint8 [documents, values];
- `shingles.npy`: uint32 [documents], how many each has; those with none take part in nothing;
- `keys.npy`: uint64 [bands, documents with shingles], ascending in each band;
- `rows.npy`: uint32, in the same shape, whose key each is.

So the documents of a band and a range of keys are one slice of a memory-mapped file.


FOLDED: Equal keys of 64 bits, found by sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.arrays import Int64Array, UInt8Array, UInt32Array, UInt64Array
from deepseek_v3.data.stages import NumberedPart, group_by_part
from deepseek_v3.utils.errors import DataError


class KeyGroups(NamedTuple):
    """Places in an array of keys, by key and then in order; equal keys have the same number of `groups`."""

    places: Int64Array
    groups: Int64Array


def group_keys(keys: UInt64Array) -> KeyGroups:
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
    return KeyGroups(packed & (1 << bits) - 1, packed >> bits)


def repeated_keys(found: KeyGroups) -> KeyGroups:
    """Those places whose keys others have too."""
    same = found.groups[1:] == found.groups[:-1]
    kept = np.append(same, False) | np.append(False, same) if len(found.groups) else np.zeros(0, np.bool_)
    return KeyGroups(found.places[kept], found.groups[kept])


def write_keys(folder: Path, signatures: UInt8Array, shingles: UInt32Array, band_keys: UInt64Array) -> None:
    """Writes them into a folder; `band_keys` is uint64 [bands, documents] in the documents' order."""
    filled = np.flatnonzero(shingles)
    orders = [filled[group_keys(keys[filled]).places] for keys in band_keys]
    np.save(folder / "signatures.npy", signatures)
    np.save(folder / "shingles.npy", shingles)
    np.save(folder / "keys.npy", [keys[order] for keys, order in zip(band_keys, orders, strict=True)])
    np.save(folder / "rows.npy", np.array(orders, np.uint32))


def read_band(parts: Sequence[NumberedPart], band: int, low: int, high: int) -> tuple[UInt64Array, Int64Array]:
    """The keys of a band from `low` to below `high`, and whose they are; documents that were removed left out."""
    found: list[tuple[UInt64Array, Int64Array]] = []
    for part in parts:
        keys = map_keys(part, "keys.npy")[band]
        start = int(np.searchsorted(keys, np.uint64(low)))
        stop = int(np.searchsorted(keys, np.uint64(high - 1), side="right"))
        rows = map_keys(part, "rows.npy")[band, start:stop]
        left = ~part.removed_rows()[rows]
        found.append((keys[start:stop][left], rows[left].astype(np.int64) + part.first))
    return np.concatenate([keys for keys, _ in found]), np.concatenate([documents for _, documents in found])


def read_signatures(parts: Sequence[NumberedPart], documents: Int64Array) -> UInt8Array:
    """uint8 [documents, values]."""
    return _read_rows(parts, documents, "signatures.npy")


def read_shingle_counts(parts: Sequence[NumberedPart], documents: Int64Array) -> UInt32Array:
    """How many shingles they have: uint32 [documents]."""
    return _read_rows(parts, documents, "shingles.npy")


def key_ranges(needed: int, memory: int) -> list[tuple[int, int]]:
    """Ranges of all keys of 64 bits, each from a first key to below another, that divide what is needed evenly."""
    ranges = -(-needed // memory)
    return list(pairwise([*(number * 2**64 // ranges for number in range(ranges)), 2**64])) if ranges else []


def map_keys(part: NumberedPart, name: str) -> NDArray[Any]:
    """A key file, mapped into memory. Raises DataError where it is missing or damaged."""
    path = part.keys / name
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: keys of a part are damaged: {error}; make them anew") from None


def _read_rows(parts: Sequence[NumberedPart], documents: Int64Array, name: str) -> NDArray[Any]:
    groups = [(part, chosen, map_keys(part, name)) for part, chosen in group_by_part(parts, documents)]
    shape, dtype = (groups[0][2].shape[1:], groups[0][2].dtype) if groups else ((0,), np.dtype(np.uint8))
    found = np.empty((len(documents), *shape), dtype)
    for part, chosen, values in groups:
        found[chosen] = values[documents[chosen] - part.first]
    return found

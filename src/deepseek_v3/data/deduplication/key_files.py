"""The key files of a part, from which near duplicates are found, and the sorting of equal 64-bit keys.

- `signatures.npy`: uint8 [documents, values], the 8-bit signatures;
- `shingles.npy`: uint32 [documents], the number of shingles; documents without any have no band keys;
- `keys.npy`: uint64 [bands, documents with shingles], the band keys, ascending in each band;
- `rows.npy`: uint32, of the same shape, the row of the document that each key belongs to.

So the documents of one band and one range of keys are a single slice of a memory-mapped file.
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
    """The positions of an array of keys, sorted by key and then by position; equal keys share a group number."""

    positions: Int64Array
    groups: Int64Array


def group_keys(keys: UInt64Array) -> KeyGroups:
    """Groups equal keys.

    NumPy's unstable sort is many times as fast as its stable one, so the keys are sorted unstably, and then group
    number and position as one number.
    """
    order = np.argsort(keys)
    ranked = keys[order]
    bits = max(len(keys), 1).bit_length()
    packed = np.cumsum(ranked[1:] != ranked[:-1])
    packed = np.append(np.zeros(min(len(keys), 1), np.int64), packed) << bits | order
    packed.sort()
    return KeyGroups(packed & (1 << bits) - 1, packed >> bits)


def repeated_keys(found: KeyGroups) -> KeyGroups:
    """Returns the groups that have at least two positions."""
    same = found.groups[1:] == found.groups[:-1]
    kept = np.append(same, False) | np.append(False, same) if len(found.groups) else np.zeros(0, np.bool_)
    return KeyGroups(found.positions[kept], found.groups[kept])


def key_ranges(needed_bytes: int, memory: int) -> list[tuple[int, int]]:
    """Divides the 64-bit keys into equal ranges [low, high), each of which needs at most `memory` bytes."""
    ranges = -(-needed_bytes // memory)
    return list(pairwise([*(number * 2**64 // ranges for number in range(ranges)), 2**64])) if ranges else []


def write_keys(folder: Path, signatures: UInt8Array, shingles: UInt32Array, band_keys: UInt64Array) -> None:
    """Writes the key files of a part; `band_keys` is uint64 [bands, documents], in the documents' order."""
    filled = np.flatnonzero(shingles)
    orders = [filled[group_keys(keys[filled]).positions] for keys in band_keys]
    np.save(folder / "signatures.npy", signatures)
    np.save(folder / "shingles.npy", shingles)
    np.save(folder / "keys.npy", [keys[order] for keys, order in zip(band_keys, orders, strict=True)])
    np.save(folder / "rows.npy", np.array(orders, np.uint32))


def read_band(parts: Sequence[NumberedPart], band: int, low: int, high: int) -> tuple[UInt64Array, Int64Array]:
    """Reads the keys of a band in [low, high) and the number of the document that each belongs to.

    Documents that a previous stage removed are left out.
    """
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
    """Reads the signatures of documents by number: uint8 [documents, values]."""
    return _read_rows(parts, documents, "signatures.npy")


def read_shingle_counts(parts: Sequence[NumberedPart], documents: Int64Array) -> UInt32Array:
    """Reads the number of shingles of documents by number: uint32 [documents]."""
    return _read_rows(parts, documents, "shingles.npy")


def map_keys(part: NumberedPart, name: str) -> NDArray[Any]:
    """Maps a key file of a part into memory. Raises DataError if it is missing or damaged."""
    path = part.keys / name
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is a damaged key file: {error}; repeat the run that wrote it") from None


def _read_rows(parts: Sequence[NumberedPart], documents: Int64Array, name: str) -> NDArray[Any]:
    groups = [(part, chosen, map_keys(part, name)) for part, chosen in group_by_part(parts, documents)]
    shape, dtype = (groups[0][2].shape[1:], groups[0][2].dtype) if groups else ((0,), np.dtype(np.uint8))
    found = np.empty((len(documents), *shape), dtype)
    for part, chosen, values in groups:
        found[chosen] = values[documents[chosen] - part.first]
    return found

"""Texts that occur more than once in a corpus: whole documents, or paragraphs or lines of them.

The keys of a part are
- `hashes.npy`: uint64 [2, texts], the halves of each text's hash, ascending by the first half;
- `rows.npy` and `places.npy`: uint32 [texts], the document that each stands in, and its number among those there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.arrays import UInt32Array, UInt64Array
from deepseek_v3.data.deduplication.key_files import group_keys, map_keys, repeated_keys
from deepseek_v3.data.stages import NumberedPart

# A text that stood before: the document that holds it, its number there, and the document that held it first.
REPEAT = np.dtype([("document", "<i8"), ("place", "<i8"), ("first", "<i8")])
Repeats = NDArray[np.void]


def write_keys(folder: Path, hashes: UInt64Array, rows: UInt32Array, places: UInt32Array) -> None:
    """Writes them into a folder, from the texts in their order; `hashes` is uint64 [texts, 2]."""
    order = group_keys(hashes[:, 0]).places
    np.save(folder / "hashes.npy", hashes[order].T)
    np.save(folder / "rows.npy", rows[order])
    np.save(folder / "places.npy", places[order])


def count_texts(parts: Sequence[NumberedPart]) -> int:
    """How many texts the parts have keys of."""
    return sum(map_keys(part, "hashes.npy").shape[1] for part in parts)


def find_repeats(parts: Sequence[NumberedPart], low: int, high: int) -> Repeats:
    """All occurrences but the first of texts whose hash begins with at least `low` and less than `high`."""
    hashes, texts = _read_range(parts, low, high)
    found = repeated_keys(group_keys(hashes[0]))
    second = hashes[1, found.places]
    order = np.lexsort((found.places, second, found.groups))
    places, second, groups = found.places[order], second[order], found.groups[order]
    new = np.ones(len(places), np.bool_)
    new[1:] = (groups[1:] != groups[:-1]) | (second[1:] != second[:-1])
    firsts = places[new][np.cumsum(new) - 1]
    repeats = texts[places[~new]]
    repeats["first"] = texts["document"][firsts[~new]]
    return repeats


def read_repeats(files: Iterable[Path]) -> Repeats:
    """The repeats in these files, by document and place."""
    repeats = np.concatenate([np.zeros(0, REPEAT), *(np.load(file) for file in files)])
    return repeats[np.lexsort((repeats["place"], repeats["document"]))]


def _read_range(parts: Sequence[NumberedPart], low: int, high: int) -> tuple[UInt64Array, Repeats]:
    """The hashes of a range, uint64 [2, texts], and where the texts stand, in the order of their first halves."""
    found: list[UInt64Array] = [np.zeros((2, 0), np.uint64)]
    texts = [np.zeros(0, REPEAT)]
    for part in parts:
        hashes = map_keys(part, "hashes.npy")
        start = int(np.searchsorted(hashes[0], np.uint64(low)))
        stop = int(np.searchsorted(hashes[0], np.uint64(high - 1), side="right"))
        rows = map_keys(part, "rows.npy")[start:stop]
        left = ~part.removed_rows()[rows]
        some = np.zeros(int(left.sum()), REPEAT)
        some["document"] = rows[left].astype(np.int64) + part.first
        some["place"] = map_keys(part, "places.npy")[start:stop][left]
        found.append(hashes[:, start:stop][:, left])
        texts.append(some)
    return np.concatenate(found, axis=1), np.concatenate(texts)

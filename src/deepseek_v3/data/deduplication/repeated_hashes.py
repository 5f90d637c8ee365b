"""Finds texts that occur more than once in a corpus: whole documents, or their paragraphs or lines.

The keys of a part are
- `hashes.npy`: uint64 [2, texts], both halves of each text's 128-bit hash, ascending by the first half;
- `rows.npy` and `places.npy`: uint32 [texts], the row of each text's document, and its position in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.arrays import UInt32Array, UInt64Array
from deepseek_v3.data.deduplication.key_files import group_keys, map_keys, repeated_keys
from deepseek_v3.data.stages import NumberedPart

# A repeated text: its document, its position there, and the document in which the text occurs first.
REPEAT = np.dtype([("document", "<i8"), ("place", "<i8"), ("first", "<i8")])
Repeats = NDArray[np.void]


def write_keys(folder: Path, hashes: UInt64Array, rows: UInt32Array, positions: UInt32Array) -> None:
    """Writes the keys of texts given in corpus order; `hashes` is uint64 [texts, 2]."""
    order = group_keys(hashes[:, 0]).positions
    np.save(folder / "hashes.npy", hashes[order].T)
    np.save(folder / "rows.npy", rows[order])
    np.save(folder / "places.npy", positions[order])


def count_texts(parts: Sequence[NumberedPart]) -> int:
    """Returns the number of texts that the parts have keys for."""
    return sum(map_keys(part, "hashes.npy").shape[1] for part in parts)


def find_repeats(parts: Sequence[NumberedPart], low: int, high: int) -> Repeats:
    """Finds every occurrence but the first of each text whose first hash half is in [low, high)."""
    hashes, texts = _read_range(parts, low, high)
    found = repeated_keys(group_keys(hashes[0]))
    second = hashes[1, found.positions]
    order = np.lexsort((found.positions, second, found.groups))
    positions, second, groups = found.positions[order], second[order], found.groups[order]
    new = np.ones(len(positions), np.bool_)
    new[1:] = (groups[1:] != groups[:-1]) | (second[1:] != second[:-1])
    firsts = positions[new][np.cumsum(new) - 1]
    repeats = texts[positions[~new]]
    repeats["first"] = texts["document"][firsts[~new]]
    return repeats


def read_repeats(files: Iterable[Path]) -> Repeats:
    """Reads the repeats in the files of tasks, sorted by document and position."""
    repeats = np.concatenate([np.zeros(0, REPEAT), *(np.load(file) for file in files)])
    return repeats[np.lexsort((repeats["place"], repeats["document"]))]


def _read_range(parts: Sequence[NumberedPart], low: int, high: int) -> tuple[UInt64Array, Repeats]:
    """Reads the hashes in [low, high) (uint64 [2, texts]) and the document and position of each text.

    Documents that a previous stage removed are left out.
    """
    found: list[UInt64Array] = [np.zeros((2, 0), np.uint64)]
    texts = [np.zeros(0, REPEAT)]
    for part in parts:
        hashes = map_keys(part, "hashes.npy")
        start = int(np.searchsorted(hashes[0], np.uint64(low)))
        stop = int(np.searchsorted(hashes[0], np.uint64(high - 1), side="right"))
        rows = map_keys(part, "rows.npy")[start:stop]
        left = ~part.removed_rows()[rows]
        in_range = np.zeros(int(left.sum()), REPEAT)
        in_range["document"] = rows[left].astype(np.int64) + part.first
        in_range["place"] = map_keys(part, "places.npy")[start:stop][left]
        found.append(hashes[:, start:stop][:, left])
        texts.append(in_range)
    return np.concatenate(found, axis=1), np.concatenate(texts)

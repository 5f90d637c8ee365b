"""Exact duplicates: equal documents, or paragraphs or lines that stand in the corpus more than once.

FOLDED: Paragraphs and lines that stood in the corpus before, taken out of the documents that repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepseek_v3.config.deduplication_config import ExactDeduplicationConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.deduplication import clusters, repeated_hashes
from deepseek_v3.data.deduplication.clusters import documents_to_filter
from deepseek_v3.data.deduplication.in_memory import Deduplicator
from deepseek_v3.data.deduplication.key_files import key_ranges, map_keys
from deepseek_v3.data.deduplication.normalization import normalized_hashes
from deepseek_v3.data.deduplication.repeated_hashes import Repeats
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.stages import Drop, NumberedPart, Outcome, Task, outcome

_BLANK_LINES = re.compile(r"(\n\s*\n)")
_UNITS_FILE = "units.npy"  # of a part: uint32 [documents], how many paragraphs or lines are not blank
_REPEATS_FILE = "repeats.npy"
_REMOVED_FILE = "removed.npy"


@dataclass(frozen=True)
class UnitDeduplication:
    """Works on one kind of `unit`, `paragraph` or `line`, and leaves those below `min_characters` alone."""

    unit: str
    min_characters: int

    def split(self, text: str) -> list[str]:
        """The paragraphs, which blank lines end, or the lines, each with what ends it."""
        if self.unit == "line":
            return text.splitlines(keepends=True)
        pieces = _BLANK_LINES.split(text)
        return [body + end for body, end in zip(pieces[::2], [*pieces[1::2], ""], strict=True)]

    def write_keys(self, table: pa.Table, folder: Path) -> None:
        """Writes the keys of all units that are long enough."""
        filled = np.zeros(table.num_rows, np.uint32)
        rows: list[int] = []
        places: list[int] = []
        texts: list[str] = []
        for row, text in enumerate(table.column("text").to_pylist()):
            for place, unit in enumerate(self.split(text)):
                characters = len(unit.strip())
                filled[row] += characters > 0
                if characters >= max(self.min_characters, 1):
                    rows.append(row)
                    places.append(place)
                    texts.append(unit)
        hashes = normalized_hashes(pa.array(texts, pa.large_string()))
        repeated_hashes.write_keys(folder, hashes, np.array(rows, np.uint32), np.array(places, np.uint32))
        np.save(folder / _UNITS_FILE, filled)

    def resolve(self, parts: Sequence[NumberedPart], found: Repeats, folder: Path) -> dict[str, Any]:
        """Writes which units go, and which documents have no others. Returns figures for the report."""
        counts = np.bincount(found["document"], minlength=sum(part.rows for part in parts))
        filled = np.concatenate([np.zeros(0, np.uint32), *(map_keys(part, _UNITS_FILE) for part in parts)])
        removed = (counts > 0) & (counts == filled)
        np.save(folder / _REPEATS_FILE, found)
        np.save(folder / _REMOVED_FILE, removed)
        judged = documents_to_filter(parts)
        return {
            "documents": int(judged.sum()),
            "duplicates": int((removed & judged).sum()),
            "shortened": int(((counts > 0) & ~removed & judged).sum()),
            f"repeated_{self.unit}s": int(counts[judged].sum()),
        }

    def apply(self, stage: str, batch: pa.RecordBatch, documents: Int64Array, folder: Path) -> Outcome:
        """Takes the repeated units out of a batch of these documents, and drops those of which nothing is left."""
        found = np.load(folder / _REPEATS_FILE, mmap_mode="r")
        starts = np.searchsorted(found["document"], documents)
        ends = np.searchsorted(found["document"], documents, side="right")
        removed = np.load(folder / _REMOVED_FILE, mmap_mode="r")[documents]
        texts = batch.column("text").to_pylist()
        drops = []
        for row in np.flatnonzero(ends > starts).tolist():
            units = self.split(texts[row])
            gone = {*found["place"][starts[row] : ends[row]].tolist()}
            if removed[row]:
                drops.append(Drop(row, f"repeated_{self.unit}s", {f"{self.unit}s": len(gone)}, units[min(gone)]))
            else:
                texts[row] = "".join(unit for place, unit in enumerate(units) if place not in gone)
        return outcome(stage, with_texts(batch, texts), drops)

    def removed(self, folder: Path) -> BoolArray:
        """Which documents have nothing left: bool [documents]."""
        return np.load(folder / _REMOVED_FILE)


_BYTES_PER_KEY = 200  # a match task's need for each text of its range, at most


class ExactDeduplicator(Deduplicator):
    """Keeps the earliest of equal documents, or of equal paragraphs or lines (`ExactDeduplicationConfig`).

    Texts are equal if their characters are, letter case and white space left out (XXH3, 128 bits); so all documents
    of nothing but white space are. Of documents with repeated paragraphs or lines the rest goes on; one without a
    rest is dropped.
    """

    name = "exact_deduplication"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(ExactDeduplicationConfig, options, type(self).__name__)
        unit = self.options.unit
        self._units = None if unit == "document" else UnitDeduplication(unit, self.options.min_characters)

    @property
    def changes_texts(self) -> bool:
        return self._units is not None

    def write_keys(self, table: pa.Table, folder: Path) -> None:
        if self._units is not None:
            self._units.write_keys(table, folder)
            return
        hashes = [normalized_hashes(texts) for texts in table.column("text").chunks]
        rows = np.arange(table.num_rows, dtype=np.uint32)
        repeated_hashes.write_keys(
            folder, np.concatenate([np.zeros((0, 2), np.uint64), *hashes]), rows, np.zeros_like(rows)
        )

    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:
        ranges = key_ranges(repeated_hashes.count_texts(parts) * _BYTES_PER_KEY, memory)
        return [Task("match", (tuple(parts), low, high)) for low, high in ranges]

    def match(self, output: Path, parts: Sequence[NumberedPart], low: int, high: int) -> None:
        """Writes the repeats among the hashes that begin with `low` to below `high`."""
        np.save(output, repeated_hashes.find_repeats(parts, low, high))

    def resolve(
        self,
        parts: Sequence[NumberedPart],
        matches: Sequence[Path],
        refined: Sequence[Path],  # noqa: ARG002
        folder: Path,
    ) -> dict[str, Any]:
        found = repeated_hashes.read_repeats(matches)
        if self._units is not None:
            return self._units.resolve(parts, found, folder)
        kept = np.arange(sum(part.rows for part in parts))
        kept[found["document"]] = found["first"]
        return clusters.write_decisions(folder, parts, kept, np.ones(len(kept)))

    def apply(
        self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: Callable[[Int64Array], list[str]]
    ) -> Outcome:
        if self._units is not None:
            return self._units.apply(self.name, batch, documents, folder)
        return clusters.drop_duplicates(self.name, "exact_duplicate", batch, documents, folder, ids_of)

    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:  # noqa: ARG002
        return clusters.read_duplicates(folder) if self._units is None else self._units.removed(folder)

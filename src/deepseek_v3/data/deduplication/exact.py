"""Exact deduplication: of documents, or of paragraphs or lines that occur in the corpus more than once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepseek_v3.config.deduplication_config import ExactDeduplicationConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.content import contents_of
from deepseek_v3.data.deduplication import clusters, repeated_hashes
from deepseek_v3.data.deduplication.key_files import key_ranges, map_keys
from deepseek_v3.data.deduplication.normalization import exact_hashes, normalized_hashes
from deepseek_v3.data.deduplication.repeated_hashes import Repeats
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.in_memory import Deduplicator
from deepseek_v3.data.stages import Drop, IdLookup, NumberedPart, Outcome, Task, outcome

_BYTES_PER_KEY = 200  # the most memory that a match task takes for each text in its range
_BLANK_LINES = re.compile(r"(\n\s*\n)")
_UNITS_FILE = "units.npy"  # uint32 [documents of a part]: the number of paragraphs or lines that are not blank
_REPEATS_FILE = "repeats.npy"
_REMOVED_FILE = "removed.npy"


class ExactDeduplicator(Deduplicator):
    """Keeps the first of equal documents, or of equal paragraphs or lines (`ExactDeduplicationConfig`).

    Texts are equal if their XXH3-128 hashes agree after normalization, which removes letter case and white space;
    so all documents of white space alone are equal. Source code, by the name of its file or its record, is equal if
    every character is. Repeated paragraphs or lines are removed from their document; a
    document that has no others is dropped.
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
        chunks = [normalized_hashes(texts) for texts in table.column("text").chunks]
        hashes = np.concatenate([np.zeros((0, 2), np.uint64), *chunks])
        code = [row for row, content in enumerate(contents_of(table)) if content == "code"]
        hashes[code] = exact_hashes(table.column("text").take(pa.array(code, pa.int64())).to_pylist())
        rows = np.arange(table.num_rows, dtype=np.uint32)
        repeated_hashes.write_keys(folder, hashes, rows, np.zeros_like(rows))

    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:
        ranges = key_ranges(repeated_hashes.count_texts(parts) * _BYTES_PER_KEY, memory)
        return [Task("match", (tuple(parts), low, high)) for low, high in ranges]

    def match(self, output: Path, parts: Sequence[NumberedPart], low: int, high: int) -> None:
        """Writes the repeats among the texts whose first hash half is in [low, high)."""
        np.save(output, repeated_hashes.find_repeats(parts, low, high))

    def resolve(
        self,
        parts: Sequence[NumberedPart],
        matches: Sequence[Path],
        refined: Sequence[Path],  # noqa: ARG002
        folder: Path,
    ) -> dict[str, Any]:
        repeats = repeated_hashes.read_repeats(matches)
        if self._units is not None:
            return self._units.resolve(parts, repeats, folder)
        kept = np.arange(sum(part.rows for part in parts))
        kept[repeats["document"]] = repeats["first"]
        return clusters.write_decisions(folder, parts, kept, np.ones(len(kept)))

    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        if self._units is not None:
            return self._units.apply(self.name, batch, documents, folder)
        return clusters.drop_duplicates(self.name, "exact_duplicate", batch, documents, folder, ids_of)

    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:  # noqa: ARG002
        return clusters.read_duplicates(folder) if self._units is None else self._units.removed(folder)


@dataclass(frozen=True)
class UnitDeduplication:
    """Removes repeated units, `paragraph` or `line`, from documents; units below `min_characters` stay."""

    unit: str
    min_characters: int

    def split(self, text: str) -> list[str]:
        """Splits a text into paragraphs (at blank lines) or lines; each keeps its separator at the end."""
        if self.unit == "line":
            return text.splitlines(keepends=True)
        fields = _BLANK_LINES.split(text)
        return [body + end for body, end in zip(fields[::2], [*fields[1::2], ""], strict=True)]

    def write_keys(self, table: pa.Table, folder: Path) -> None:
        """Writes the keys of all units that are long enough."""
        num_filled = np.zeros(table.num_rows, np.uint32)
        is_code = [content == "code" for content in contents_of(table)]
        rows: list[int] = []
        positions: list[int] = []
        texts: list[str] = []
        for row, text in enumerate(table.column("text").to_pylist()):
            for position, unit in enumerate(self.split(text)):
                characters = len(unit.strip())
                num_filled[row] += characters > 0
                if characters >= max(self.min_characters, 1):
                    rows.append(row)
                    positions.append(position)
                    texts.append(unit)
        hashes = normalized_hashes(pa.array(texts, pa.large_string()))
        code = [index for index, row in enumerate(rows) if is_code[row]]
        hashes[code] = exact_hashes([texts[index].rstrip() for index in code])
        repeated_hashes.write_keys(folder, hashes, np.array(rows, np.uint32), np.array(positions, np.uint32))
        np.save(folder / _UNITS_FILE, num_filled)

    def resolve(self, parts: Sequence[NumberedPart], repeats: Repeats, folder: Path) -> dict[str, Any]:
        """Writes the units to remove, and marks documents without other units. Returns figures for the report."""
        counts = np.bincount(repeats["document"], minlength=sum(part.rows for part in parts))
        num_filled = np.concatenate([np.zeros(0, np.uint32), *(map_keys(part, _UNITS_FILE) for part in parts)])
        removed = (counts > 0) & (counts == num_filled)
        np.save(folder / _REPEATS_FILE, repeats)
        np.save(folder / _REMOVED_FILE, removed)
        in_this_run = clusters.documents_to_filter(parts)
        return {
            "documents": int(in_this_run.sum()),
            "duplicates": int((removed & in_this_run).sum()),
            "shortened": int(((counts > 0) & ~removed & in_this_run).sum()),
            f"repeated_{self.unit}s": int(counts[in_this_run].sum()),
        }

    def apply(self, stage: str, batch: pa.RecordBatch, documents: Int64Array, folder: Path) -> Outcome:
        """Removes repeated units from a batch of these documents, and drops documents that have no other units."""
        repeats = np.load(folder / _REPEATS_FILE, mmap_mode="r")
        starts = np.searchsorted(repeats["document"], documents)
        ends = np.searchsorted(repeats["document"], documents, side="right")
        removed = np.load(folder / _REMOVED_FILE, mmap_mode="r")[documents]
        texts = batch.column("text").to_pylist()
        drops = []
        for row in np.flatnonzero(ends > starts).tolist():
            units = self.split(texts[row])
            repeated = {*repeats["place"][starts[row] : ends[row]].tolist()}
            if removed[row]:
                figures = {f"{self.unit}s": len(repeated)}
                drops.append(Drop(row, f"repeated_{self.unit}s", figures, units[min(repeated)]))
            else:
                texts[row] = "".join(unit for position, unit in enumerate(units) if position not in repeated)
        return outcome(stage, with_texts(batch, texts), drops)

    def removed(self, folder: Path) -> BoolArray:
        """Marks the documents that have only repeated units: bool [documents]."""
        return np.load(folder / _REMOVED_FILE)

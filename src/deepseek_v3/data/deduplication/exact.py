"""Exact duplicates: equal documents, or paragraphs or lines that stand in the corpus more than once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.config.preprocessing.deduplication import ExactDeduplicationConfig
from deepseek_v3.data.deduplication import decisions, repeats
from deepseek_v3.data.deduplication.keys import key_ranges
from deepseek_v3.data.deduplication.normal_form import normal_hashes
from deepseek_v3.data.deduplication.shortening import Shortening
from deepseek_v3.data.deduplication.standalone import Deduplicator
from deepseek_v3.data.deduplication.utf8 import Int64s
from deepseek_v3.data.stages import Outcome, Part, Task

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
        self._units = None if unit == "document" else Shortening(unit, self.options.min_characters)

    @property
    def changes_texts(self) -> bool:
        return self._units is not None

    def write_keys(self, table: pa.Table, folder: Path) -> None:
        if self._units is not None:
            self._units.write_keys(table, folder)
            return
        hashes = [normal_hashes(texts) for texts in table.column("text").chunks]
        rows = np.arange(table.num_rows, dtype=np.uint32)
        repeats.write_keys(
            folder, np.concatenate([np.zeros((0, 2), np.uint64), *hashes]), rows, np.zeros_like(rows)
        )

    def match_tasks(self, parts: Sequence[Part], memory: int) -> list[Task]:
        ranges = key_ranges(repeats.count_texts(parts) * _BYTES_PER_KEY, memory)
        return [Task("match", (tuple(parts), low, high)) for low, high in ranges]

    def match(self, output: Path, parts: Sequence[Part], low: int, high: int) -> None:
        """Writes the repeats among the hashes that begin with `low` to below `high`."""
        np.save(output, repeats.find_repeats(parts, low, high))

    def resolve(
        self,
        parts: Sequence[Part],
        matches: Sequence[Path],
        refined: Sequence[Path],  # noqa: ARG002
        folder: Path,
    ) -> dict[str, Any]:
        found = repeats.read_repeats(matches)
        if self._units is not None:
            return self._units.resolve(parts, found, folder)
        kept = np.arange(sum(part.rows for part in parts))
        kept[found["document"]] = found["first"]
        return decisions.write_decisions(folder, parts, kept, np.ones(len(kept)))

    def apply(
        self, batch: pa.RecordBatch, documents: Int64s, folder: Path, ids_of: Callable[[Int64s], list[str]]
    ) -> Outcome:
        if self._units is not None:
            return self._units.apply(self.name, batch, documents, folder)
        return decisions.drop_duplicates(self.name, "exact_duplicate", batch, documents, folder, ids_of)

    def removed(self, parts: Sequence[Part], folder: Path) -> NDArray[np.bool_]:  # noqa: ARG002
        return decisions.removed_documents(folder) if self._units is None else self._units.removed(folder)

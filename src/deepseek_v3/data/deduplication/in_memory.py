"""Deduplication of documents at hand, without a pipeline around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.documents import ConvertedBatch, Documents, convert_back, convert_documents
from deepseek_v3.data.stages import Filtered, FilteredBuilder, GlobalStage, NumberedPart, Task

_MEMORY = 2**28  # bytes for one task


class Deduplicator(GlobalStage):
    """A corpus stage that also works alone."""

    def deduplicate(self, documents: Documents) -> Filtered:
        """Removes duplicates from texts, Documents, mappings or Arrow data: a list, an iterator or a table.

        Returns the unique documents, of the caller's own kind, their ids, or positions counted from 0, and figures:
        `documents`, `unique`, `duplicates`, `reasons`, and what else `resolve` reports. Works in a temporary folder
        a little larger than the texts. Raises DataError where one of them is no document.
        """
        with TemporaryDirectory(prefix="deduplication-") as name:
            folder = Path(name)
            batches, parts = self._written(documents, folder)
            matches = self._run(self.match_tasks(parts, _MEMORY), folder, "match")
            refined = self._run(self.refine_tasks(parts, _MEMORY, matches), folder, "refine")
            decisions = folder / "decisions"
            decisions.mkdir()
            figures = self.resolve(parts, matches, refined, decisions)
            filtered = self._applied(batches, parts, decisions)
        stats = {**figures, "unique": filtered.stats["kept"], "reasons": filtered.stats["reasons"]}
        return Filtered(filtered.documents, filtered.ids, stats)

    def _written(self, documents: Documents, folder: Path) -> tuple[list[ConvertedBatch], list[NumberedPart]]:
        """The documents, left in files that are mapped into memory, and their keys."""
        batches: list[ConvertedBatch] = []
        parts: list[NumberedPart] = []
        first = 0
        for number, given in enumerate(convert_documents(documents)):
            part = NumberedPart(
                folder / f"keys-{number}", folder / f"{number}.arrow", first, given.records.num_rows
            )
            part.keys.mkdir()
            with pa.OSFile(str(part.records), "wb") as sink, pa.ipc.new_file(sink, given.records.schema) as writer:
                writer.write_batch(given.records)
            self.write_keys(pa.Table.from_batches([given.records]), part.keys)
            batches.append(replace(given, records=pa.ipc.open_file(pa.memory_map(str(part.records))).get_batch(0)))
            parts.append(part)
            first += part.rows
        return batches, parts

    def _run(self, tasks: Sequence[Task], folder: Path, kind: str) -> list[Path]:
        files = [folder / f"{kind}-{number}.npy" for number in range(len(tasks))]
        for task, file in zip(tasks, files, strict=True):
            getattr(self, task.method)(file, *task.arguments)
        return files

    def _applied(
        self, batches: Sequence[ConvertedBatch], parts: Sequence[NumberedPart], decisions: Path
    ) -> Filtered:
        ids = np.array([str(id_) for given in batches for id_ in given.ids], object)

        def ids_of(documents: Int64Array) -> list[str]:
            return ids[documents].tolist()

        collected = FilteredBuilder()
        for given, part in zip(batches, parts, strict=True):
            numbers = np.arange(part.first, part.first + part.rows)
            result = self.apply(given.records, numbers, decisions, ids_of)
            rows = np.flatnonzero(result.kept_rows).tolist()
            reasons = result.dropped.column("reason").to_pylist()
            kept = convert_back(given, result.kept, rows)
            collected.add(kept, [given.ids[row] for row in rows], part.rows, reasons)
        return collected.result()

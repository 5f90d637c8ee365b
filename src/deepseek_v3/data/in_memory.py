"""Runs global stages on documents in memory, without the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.documents import ConvertedBatch, Documents, convert_documents
from deepseek_v3.data.stages import Filtered, FilteredBuilder, GlobalStage, NumberedPart, Task

_MEMORY = 2**28  # bytes for one task


class GlobalResult(NamedTuple):
    """What a global stage kept, and its figures."""

    filtered: Filtered
    figures: dict[str, Any]


def run_global_stage(stage: GlobalStage, documents: Documents) -> GlobalResult:
    """Runs a stage on texts, Documents, mappings or Arrow data: a list, an iterator or a table.

    Works in a temporary folder that takes a little more space than the texts. Raises DataError for an item that is
    not a document.
    """
    with TemporaryDirectory(prefix=f"{stage.name}-") as name:
        folder = Path(name)
        batches, parts = _write_parts(stage, documents, folder)

        def execute(kind: str, tasks: Sequence[Task]) -> list[Path]:
            files = [folder / f"{kind}-{number}.npy" for number in range(len(tasks))]
            for task, file in zip(tasks, files, strict=True):
                task.run(stage, file)
            return files

        matches, refined = stage.run_tasks(parts, _MEMORY, execute)
        decisions = folder / "decisions"
        decisions.mkdir()
        figures = stage.resolve(parts, matches, refined, decisions)
        return GlobalResult(_apply_decisions(stage, batches, parts, decisions), figures)


class Deduplicator(GlobalStage):
    """A global stage that can also be run without the pipeline, on documents in memory."""

    def deduplicate(self, documents: Documents) -> Filtered:
        """Removes duplicates from texts, Documents, mappings or Arrow data: a list, an iterator or a table.

        Returns the unique documents as the caller's own kind of object, their ids (or positions, counted from 0),
        and figures: `documents`, `unique`, `duplicates`, `reasons`, and the stage's own. Works in a temporary
        folder that takes a little more space than the texts. Raises DataError for an item that is not a document.
        """
        filtered, figures = run_global_stage(self, documents)
        stats = {**figures, "unique": filtered.stats["kept"], "reasons": filtered.stats["reasons"]}
        return Filtered(filtered.documents, filtered.ids, stats)


def _write_parts(
    stage: GlobalStage, documents: Documents, folder: Path
) -> tuple[list[ConvertedBatch], list[NumberedPart]]:
    """Writes the documents and their keys; returns the batches, mapped from their files, and the parts."""
    batches: list[ConvertedBatch] = []
    parts: list[NumberedPart] = []
    first = 0
    for number, given in enumerate(convert_documents(documents)):
        part = NumberedPart(folder / f"keys-{number}", folder / f"{number}.arrow", first, given.records.num_rows)
        part.keys.mkdir()
        with pa.OSFile(str(part.records), "wb") as sink, pa.ipc.new_file(sink, given.records.schema) as writer:
            writer.write_batch(given.records)
        stage.write_keys(pa.Table.from_batches([given.records]), part.keys)
        batches.append(replace(given, records=pa.ipc.open_file(pa.memory_map(str(part.records))).get_batch(0)))
        parts.append(part)
        first += part.rows
    return batches, parts


def _apply_decisions(
    stage: GlobalStage, batches: Sequence[ConvertedBatch], parts: Sequence[NumberedPart], decisions: Path
) -> Filtered:
    ids = np.array([str(id_) for given in batches for id_ in given.ids], object)

    def ids_of(documents: Int64Array) -> list[str]:
        return ids[documents].tolist()

    collected = FilteredBuilder()
    for given, part in zip(batches, parts, strict=True):
        documents = np.arange(part.first, part.first + part.rows)
        collected.add(given, stage.apply(given.records, documents, decisions, ids_of))
    return collected.result()

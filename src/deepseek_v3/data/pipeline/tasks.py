"""The tasks of a run, which executors run in any order: read a work unit, apply stages to a part, write a shard.

A task writes its result into one folder per part, which appears under its name only once it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.documents import RECORDS
from deepseek_v3.data.formats.batches import BATCH_BYTES, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.quarantine import QUARANTINED
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.data.mixing import repeat_documents
from deepseek_v3.data.pipeline.global_stages import StageDecisions
from deepseek_v3.data.pipeline.passes import Pass
from deepseek_v3.data.pipeline.range_reading import read_ranges
from deepseek_v3.data.pipeline.run_folder import (
    DROPPED_FILE,
    QUARANTINED_FILE,
    RECORDS_FILE,
    STATS_FILE,
    Part,
    finish_part,
    read_part,
    read_table,
    single_batch,
    verify_part,
    write_table,
)
from deepseek_v3.data.pipeline.stats import Stats
from deepseek_v3.data.pipeline.unique_ids import UniqueIds, as_quarantined
from deepseek_v3.data.stages import DROPPED, GlobalStage, Outcome, Stage
from deepseek_v3.data.tokens.token_counter import TokenCounter
from deepseek_v3.utils.files import atomic_folder


class StageRunner:
    """Runs batches of one part through the stages of a pass, and collects drops, quarantined records and counts.

    `copies` counts the documents that a stage, such as mixing, wrote again.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._dropped: list[pa.RecordBatch] = []
        self._quarantined: list[pa.RecordBatch] = []
        self.stats = Stats()
        self.copies = 0

    def run(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Applies all stages of the pass and returns the documents that are left."""
        for stage in self._stages:
            result = stage.apply(batch)
            self.record(stage.name, batch, result)
            batch = result.kept
        return batch

    def record(self, stage: str, before: pa.RecordBatch, result: Outcome) -> None:
        """Counts the result of a stage for the batch `before`, and collects the documents that it dropped."""
        missing = before.num_rows - int(result.kept_rows.sum()) - result.dropped.num_rows
        if missing:
            raise AssertionError(f"stage {stage} lost {missing} documents of a batch without a reason")
        if result.copies is not None:
            self.copies += int(result.copies.sum()) - len(result.copies)
        self.stats.stage(stage, before, result)
        if result.dropped.num_rows:
            self._dropped.append(result.dropped)

    def quarantine(self, quarantined: pa.RecordBatch) -> None:
        """Collects quarantined records. The caller counts them."""
        if quarantined.num_rows:
            self._quarantined.append(quarantined)

    def write(self, folder: Path) -> None:
        """Writes the dropped documents, the quarantined records and the counts."""
        write_table(pa.Table.from_batches(self._dropped, DROPPED), folder / DROPPED_FILE)
        write_table(pa.Table.from_batches(self._quarantined, QUARANTINED), folder / QUARANTINED_FILE)
        (folder / STATS_FILE).write_bytes(self.stats.to_json())


@dataclass(frozen=True)
class WorkUnit:
    """Ranges of input files that one task reads, in the order of the corpus. `size` is their bytes on disk."""

    number: int
    spans: tuple[FileRange, ...]
    size: int


def read_work_unit(
    unit: WorkUnit,
    options: ReadOptions,
    first: Pass,
    following: Sequence[GlobalStage],
    folder: Path,
    part_bytes: int,
) -> int:
    """Reads the rest of a work unit in parts, applies the stages of the `first` pass, and returns its number.

    A part ends with the batch that brings what it read to `part_bytes`, so parts depend only on the input. Each
    part also holds the keys of its documents for the `following` global stages.
    """
    parts = finished_parts(unit.number, folder)
    resume = parts[-1].resume if parts else (0, 0)
    while resume is not None:
        target = folder / f"{unit.number:06d}-{len(parts):05d}"
        batches = read_ranges(unit.spans, options, resume)
        part = _read_part(batches, first, following, target, part_bytes)
        parts.append(part)
        resume = part.resume
    return unit.number


def finished_parts(unit: int, folder: Path) -> list[Part]:
    """The finished parts of a work unit, in order."""
    parts: list[Part] = []
    while part := read_part(folder / f"{unit:06d}-{len(parts):05d}"):
        parts.append(part)
    return parts


def _read_part(
    batches: Iterator[tuple[ReadBatch, tuple[int, int]]],
    first: Pass,
    following: Sequence[GlobalStage],
    target: Path,
    part_bytes: int,
) -> Part:
    """Reads batches until records and quarantine take `part_bytes`, applies the stages and writes the part."""
    runner = StageRunner(first.stages)
    kept: list[pa.RecordBatch] = []
    read_bytes = 0
    resume = None
    for batch, place in batches:
        runner.stats.read(batch.records, batch.quarantined)
        runner.stats.repaired(batch.repaired)
        runner.stats.skipped(batch.skipped)
        runner.quarantine(batch.quarantined)
        read_bytes += batch.nbytes
        kept.append(runner.run(batch.records))
        if read_bytes >= part_bytes:
            resume = place
            break
    if not kept:  # an empty part also needs the columns that the stages append
        kept.append(runner.run(pa.RecordBatch.from_pylist([], RECORDS)))
    return write_records(pa.Table.from_batches(kept), runner, following, target, resume)


def apply_stages(
    target: Path, number: int, decisions: Sequence[StageDecisions], this: Pass, following: Sequence[GlobalStage]
) -> None:
    """Runs pass `this`, which is neither the first nor the last one, on the part with this number.

    Applies the decisions of the global stages, then the stages. The folder `target` receives the documents that are
    left, their keys for the `following` global stages, and the dropped documents.
    """
    runner = StageRunner(this.stages)
    kept = pa.Table.from_batches(_run_pass(number, decisions, this, runner))
    write_records(kept, runner, following, target)


def write_shard(
    target: Path,
    numbers: Sequence[int],
    decisions: Sequence[StageDecisions],
    this: Pass,
    file_name: str,
    tokens: TokenCounter,
) -> None:
    """Runs the last pass on several parts, whose remaining documents become one output file."""
    runner = StageRunner(this.stages)
    rows = num_bytes = 0
    with atomic_folder(target, keep_existing=True) as partial:
        with RecordWriter(partial / file_name) as writer:
            for number in numbers:
                for batch in _run_pass(number, decisions, this, runner):
                    runner.stats.kept(batch, tokens.total(batch.column("text")))
                    writer.write(batch)
                    rows += batch.num_rows
                    num_bytes += text_bytes(batch)
        runner.stats.copies(runner.copies)
        runner.write(partial)
        finish_part(target, partial, rows, num_bytes, None)


def _run_pass(
    number: int, decisions: Sequence[StageDecisions], this: Pass, runner: StageRunner
) -> Iterator[pa.RecordBatch]:
    """Yields the documents of a part that the decisions and the stages of a pass keep, in one batch or several."""
    records = decisions[0].own_part(number).records
    assert records is not None
    verify_part(records.parent, [RECORDS_FILE])
    batch = single_batch(read_table(records))
    rows = np.arange(batch.num_rows)
    copies = None
    for stage, decision in zip(this.global_stages, decisions, strict=True):
        documents = decision.own_part(number).first + rows
        result = stage.apply(batch, documents, decision.folder, decision.ids_of)
        if isinstance(stage, UniqueIds):
            repeated = as_quarantined(batch, result)
            runner.stats.quarantine(repeated)
            runner.quarantine(repeated)
        else:
            runner.record(stage.name, batch, result)
        batch, rows, copies = result.kept, rows[result.kept_rows], result.copies
    for small_batch in _split_batch(batch) if copies is None else repeat_documents(batch, copies, BATCH_BYTES):
        yield runner.run(small_batch)


def _split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices a batch into batches of the size that reading gives. Yields an empty batch unchanged."""
    ends = np.cumsum(pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False)) // BATCH_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), batch.num_rows]
    for start, stop in pairwise(cuts):
        yield batch.slice(start, stop - start)


def write_records(
    table: pa.Table,
    runner: StageRunner,
    following: Sequence[GlobalStage],
    target: Path,
    resume: tuple[int, int] | None = None,
) -> Part:
    """Writes a part: its documents, their keys for the `following` global stages, and what `runner` collected."""
    table = table.combine_chunks()
    with atomic_folder(target, keep_existing=True) as partial:
        write_table(table, partial / RECORDS_FILE)
        for stage in following:
            keys = partial / "keys" / stage.name
            keys.mkdir(parents=True)
            stage.write_keys(table, keys)
        runner.write(partial)
        return finish_part(target, partial, table.num_rows, text_bytes(table), resume)


def text_bytes(records: pa.RecordBatch | pa.Table) -> int:
    """The bytes of all texts in UTF-8."""
    return int(pc.sum(pc.binary_length(records.column("text"))).as_py() or 0)

"""The first pass: reads a unit of the input, applies the first stages, and writes its documents in parts.

FOLDED: The later passes: carry out what was decided about a part's documents, apply stages, and write what is left.


FOLDED: Runs batches through the stages of a pass and gathers what comes out, what is dropped, and the counts.
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
from deepseek_v3.data.formats.reading import read_range
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.data.pipeline.global_stages import StageDecisions
from deepseek_v3.data.pipeline.passes import Pass
from deepseek_v3.data.pipeline.run_folder import (
    DROPPED_FILE,
    QUARANTINED_FILE,
    RECORDS_FILE,
    STATS_FILE,
    Part,
    appearing_folder,
    finish_part,
    read_part,
    read_table,
    single_batch,
    write_table,
)
from deepseek_v3.data.pipeline.stats import Stats
from deepseek_v3.data.pipeline.unique_ids import UniqueIds, as_quarantined
from deepseek_v3.data.stages import DROPPED, GlobalStage, Outcome, Stage
from deepseek_v3.data.tokens.tokenizer import TokenCounter


def apply_stages(
    target: Path, number: int, decisions: Sequence[StageDecisions], this: Pass, following: Sequence[GlobalStage]
) -> None:
    """Carries out the decisions for the part of that number and applies the stages of a pass, not the last one.

    What is left, its keys for the `following` stages, and what was dropped appear in the folder `target`.
    """
    runner = StageRunner(this.stages)
    kept = pa.Table.from_batches(_judged(number, decisions, this, runner))
    write_records(kept, runner, following, target)


def write_shard(
    target: Path,
    numbers: Sequence[int],
    decisions: Sequence[StageDecisions],
    this: Pass,
    file_name: str,
    tokens: TokenCounter,
) -> None:
    """As `judge_part`, in the last pass, for several parts whose documents become one output file."""
    runner = StageRunner(this.stages)
    rows = num_bytes = 0
    with appearing_folder(target) as partial:
        with RecordWriter(partial / file_name) as writer:
            for number in numbers:
                for batch in _judged(number, decisions, this, runner):
                    runner.stats.kept(batch, tokens.total(batch.column("text")))
                    writer.write(batch)
                    rows += batch.num_rows
                    num_bytes += text_bytes(batch)
        runner.stats.copies(runner.copies)
        runner.write(partial)
        finish_part(target, partial, rows, num_bytes, None)


def _judged(
    number: int, decisions: Sequence[StageDecisions], this: Pass, runner: StageRunner
) -> Iterator[pa.RecordBatch]:
    """The documents of a part that are left after the decisions and the stages of a pass; one batch or several."""
    records = decisions[0].own(number).records
    assert records is not None
    batch = single_batch(read_table(records))
    rows = np.arange(batch.num_rows)
    for stage, decision in zip(this.global_stages, decisions, strict=True):
        documents = decision.own(number).first + rows
        result = stage.apply(batch, documents, decision.folder, decision.ids_of)
        if isinstance(stage, UniqueIds):
            repeated = as_quarantined(batch, result)
            runner.stats.quarantine(repeated)
            runner.quarantine(repeated)
        else:
            runner.record(stage.name, batch, result)
        batch, rows = result.kept, rows[result.kept_rows]
    for piece in _pieces(batch):
        yield runner.run(piece)


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in slices as small as those that reading gives; an empty batch as it is."""
    ends = np.cumsum(pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False)) // BATCH_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), batch.num_rows]
    for start, stop in pairwise(cuts):
        yield batch.slice(start, stop - start)


@dataclass(frozen=True)
class WorkUnit:
    """Spans of the input that one task reads, in the order of the corpus."""

    number: int
    spans: tuple[FileRange, ...]
    size: int  # bytes on disk


def read_work_unit(
    unit: WorkUnit,
    options: ReadOptions,
    first: Pass,
    following: Sequence[GlobalStage],
    folder: Path,
    part_bytes: int,
) -> int:
    """Reads what is left of a unit, and returns its number.

    A part ends with the batch that brings its text, as it was read, to `part_bytes`, so parts depend on the input
    alone. Their documents have passed the stages of `first`, and their keys for the `following` stages are written.
    """
    parts = finished_parts(unit.number, folder)
    resume = parts[-1].resume if parts else (0, 0)
    while resume is not None:
        target = folder / f"{unit.number:06d}-{len(parts):05d}"
        batches = _batches(unit, options, resume)
        part = _write_part(batches, first, following, target, part_bytes)
        parts.append(part)
        resume = part.resume
    return unit.number


def finished_parts(unit: int, folder: Path) -> list[Part]:
    """The parts of a unit that are finished, in order."""
    parts: list[Part] = []
    while part := read_part(folder / f"{unit:06d}-{len(parts):05d}"):
        parts.append(part)
    return parts


def _batches(
    unit: WorkUnit, options: ReadOptions, resume: tuple[int, int]
) -> Iterator[tuple[ReadBatch, tuple[int, int]]]:
    """The batches of a unit from a place on, each with the place where the next one starts."""
    index, position = resume
    for number in range(index, len(unit.spans)):
        start = position if number == index and position else None
        for batch in read_range(unit.spans[number], options, start):
            yield batch, (number, batch.position)


def _write_part(
    batches: Iterator[tuple[ReadBatch, tuple[int, int]]],
    first: Pass,
    following: Sequence[GlobalStage],
    target: Path,
    part_bytes: int,
) -> Part:
    runner = StageRunner(first.stages)
    kept: list[pa.RecordBatch] = []
    read_bytes = 0
    resume = None
    for batch, place in batches:
        runner.stats.read(batch.records, batch.quarantined)
        runner.quarantine(batch.quarantined)
        read_bytes += text_bytes(batch.records)
        kept.append(runner.run(batch.records))
        if read_bytes >= part_bytes:
            resume = place
            break
    if not kept:  # stages append their columns to no documents as well
        kept.append(runner.run(pa.RecordBatch.from_pylist([], RECORDS)))
    table = pa.Table.from_batches(kept)
    return write_records(table, runner, following, target, resume)


def write_records(
    table: pa.Table,
    runner: StageRunner,
    following: Sequence[GlobalStage],
    target: Path,
    resume: tuple[int, int] | None = None,
) -> Part:
    """Writes a part: its documents, their keys for the stages that come next, and what was collected on the way."""
    table = table.combine_chunks()
    with appearing_folder(target) as partial:
        write_table(table, partial / RECORDS_FILE)
        for stage in following:
            keys = partial / "keys" / stage.name
            keys.mkdir(parents=True)
            stage.write_keys(table, keys)
        runner.write(partial)
        return finish_part(target, partial, table.num_rows, text_bytes(table), resume)


def text_bytes(records: pa.RecordBatch | pa.Table) -> int:
    """Bytes of text in UTF-8."""
    return int(pc.sum(pc.binary_length(records.column("text"))).as_py() or 0)


class StageRunner:
    """What the documents of one part became."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._dropped: list[pa.RecordBatch] = []
        self._quarantined: list[pa.RecordBatch] = []
        self.stats = Stats()
        self.copies = 0  # of documents that go on more than once

    def run(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch after all stages of the pass."""
        for stage in self._stages:
            result = stage.apply(batch)
            self.record(stage.name, batch, result)
            batch = result.kept
        return batch

    def record(self, stage: str, before: pa.RecordBatch, result: Outcome) -> None:
        """Counts what a stage did to a batch, and keeps what it dropped."""
        missing = before.num_rows - int(result.kept_rows.sum()) - result.dropped.num_rows
        if missing:
            raise AssertionError(f"stage {stage} lost {missing} documents of a batch without a reason")
        self.copies += result.kept.num_rows - int(result.kept_rows.sum())
        self.stats.stage(stage, before, result)
        if result.dropped.num_rows:
            self._dropped.append(result.dropped)

    def quarantine(self, quarantined: pa.RecordBatch) -> None:
        """Keeps records that were set aside; they are counted by whoever found them."""
        if quarantined.num_rows:
            self._quarantined.append(quarantined)

    def write(self, folder: Path) -> None:
        """Writes what was dropped and set aside, and the counts."""
        write_table(pa.Table.from_batches(self._dropped, DROPPED), folder / DROPPED_FILE)
        write_table(pa.Table.from_batches(self._quarantined, QUARANTINED), folder / QUARANTINED_FILE)
        (folder / STATS_FILE).write_bytes(self.stats.to_json())

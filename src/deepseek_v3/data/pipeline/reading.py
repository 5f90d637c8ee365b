"""The first pass: reads a unit of the input, applies the first stages, and writes its documents in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.formats.batches import ReadBatch, ReadOptions, Span
from deepseek_v3.data.formats.reading import read_span
from deepseek_v3.data.pipeline.collector import Collector
from deepseek_v3.data.pipeline.parts import (
    RECORDS_FILE,
    FinishedPart,
    appearing_folder,
    finish_part,
    read_part,
    write_table,
)
from deepseek_v3.data.pipeline.program import Pass
from deepseek_v3.data.records import RECORDS
from deepseek_v3.data.stages import CorpusStage


@dataclass(frozen=True)
class Unit:
    """Spans of the input that one task reads, in the order of the corpus."""

    number: int
    spans: tuple[Span, ...]
    size: int  # bytes on disk


def read_unit(
    unit: Unit, options: ReadOptions, first: Pass, following: Sequence[CorpusStage], folder: Path, part_bytes: int
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


def finished_parts(unit: int, folder: Path) -> list[FinishedPart]:
    """The parts of a unit that are finished, in order."""
    parts: list[FinishedPart] = []
    while part := read_part(folder / f"{unit:06d}-{len(parts):05d}"):
        parts.append(part)
    return parts


def _batches(
    unit: Unit, options: ReadOptions, resume: tuple[int, int]
) -> Iterator[tuple[ReadBatch, tuple[int, int]]]:
    """The batches of a unit from a place on, each with the place where the next one starts."""
    index, position = resume
    for number in range(index, len(unit.spans)):
        start = position if number == index and position else None
        for batch in read_span(unit.spans[number], options, start):
            yield batch, (number, batch.position)


def _write_part(
    batches: Iterator[tuple[ReadBatch, tuple[int, int]]],
    first: Pass,
    following: Sequence[CorpusStage],
    target: Path,
    part_bytes: int,
) -> FinishedPart:
    collector = Collector(first.stages)
    kept: list[pa.RecordBatch] = []
    read_bytes = 0
    resume = None
    for batch, place in batches:
        collector.tally.read(batch.records, batch.quarantined)
        collector.quarantine(batch.quarantined)
        read_bytes += text_bytes(batch.records)
        kept.append(collector.judge(batch.records))
        if read_bytes >= part_bytes:
            resume = place
            break
    if not kept:  # stages append their columns to no documents as well
        kept.append(collector.judge(pa.RecordBatch.from_pylist([], RECORDS)))
    table = pa.Table.from_batches(kept)
    return write_records(table, collector, following, target, resume)


def write_records(
    table: pa.Table,
    collector: Collector,
    following: Sequence[CorpusStage],
    target: Path,
    resume: tuple[int, int] | None = None,
) -> FinishedPart:
    """Writes a part: its documents, their keys for the stages that come next, and what was collected on the way."""
    table = table.combine_chunks()
    with appearing_folder(target) as partial:
        write_table(table, partial / RECORDS_FILE)
        for stage in following:
            keys = partial / "keys" / stage.name
            keys.mkdir(parents=True)
            stage.write_keys(table, keys)
        collector.write(partial)
        return finish_part(target, partial, table.num_rows, text_bytes(table), resume)


def text_bytes(records: pa.RecordBatch | pa.Table) -> int:
    """Bytes of text in UTF-8."""
    return int(pc.sum(pc.binary_length(records.column("text"))).as_py() or 0)

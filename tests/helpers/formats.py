"""Helpers that read whole files and ranges, and check that reading can stop and continue anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from deepseek_v3.data.formats.batches import FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.inputs import InputFile, find_inputs
from deepseek_v3.data.formats.reading import read_range, split_file

Rows = list[dict[str, Any]]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def file_of(path: Path) -> InputFile:
    (file,) = find_inputs(path).files
    return file


def read(path: Path, **options: Any) -> tuple[Rows, Rows]:
    """All records and all quarantined entries of a file; checks that reading can continue from any position."""
    return rows(read_resumably(FileRange(file_of(path)), ReadOptions(**options)))


def repairs(path: Path, **options: Any) -> dict[str, int]:
    """The number of repaired records of a file by kind of repair."""
    found: Counter[str] = Counter()
    for batch in read_range(FileRange(file_of(path)), ReadOptions(**options)):
        found.update(batch.repaired)
    return dict(found)


def skips(path: Path, **options: Any) -> dict[str, int]:
    """What is no document by the rules of the format of a file, by kind."""
    found: Counter[str] = Counter()
    for batch in read_range(FileRange(file_of(path)), ReadOptions(**options)):
        found.update(batch.skipped)
    return dict(found)


def read_in_ranges(path: Path, range_bytes: int, **options: Any) -> tuple[Rows, Rows]:
    """Like `read`, one range after the other."""
    batches: list[ReadBatch] = []
    for file_range in split_file(file_of(path), range_bytes):
        batches += read_resumably(file_range, ReadOptions(**options))
    return rows(batches)


def read_resumably(file_range: FileRange, options: ReadOptions) -> list[ReadBatch]:
    """The batches of a range; checks that reading from each position gives the same remaining batches."""
    batches = list(read_range(file_range, options))
    for number, batch in enumerate(batches, start=1):
        again = list(read_range(file_range, options, batch.position))
        assert [one.position for one in again] == [one.position for one in batches[number:]]
        assert rows(again) == rows(batches[number:])
    return batches


def rows(batches: list[ReadBatch]) -> tuple[Rows, Rows]:
    records = [row for batch in batches for row in batch.records.to_pylist()]
    return records, [row for batch in batches for row in batch.quarantined.to_pylist()]


def texts(records: Rows) -> list[str]:
    return [record["text"] for record in records]


def reasons(quarantined: Rows) -> list[str]:
    return [entry["reason"] for entry in quarantined]

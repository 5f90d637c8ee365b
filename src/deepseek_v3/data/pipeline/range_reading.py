"""Reads the file ranges of a work unit in large batches, also where the files are small.

A batch starts every stage once, and a stage compiles its patterns and calls Arrow for each batch. So small files
share a batch: a folder of source code takes little more time than the same documents in one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
    join_batches,
)
from deepseek_v3.data.formats.file_types import FileAdder, known_format
from deepseek_v3.data.formats.inputs import check_unchanged
from deepseek_v3.data.formats.reading import read_range
from deepseek_v3.data.pipeline.executors import RESUME_ADVICE
from deepseek_v3.utils.errors import translate_resource_errors

# Where reading continues: the index of a range, and a position in it.
Place: TypeAlias = tuple[int, int]


def read_ranges(
    ranges: Sequence[FileRange], options: ReadOptions, resume: Place
) -> Iterator[tuple[ReadBatch, Place]]:
    """Reads ranges in order from `resume` on: batches, each with the place where the next one starts.

    A batch takes about half of `BATCH_BYTES` to all of it, or holds `BATCH_RECORDS`, unless a range has larger
    batches or less is left. Raises DataError if a file changed since the run began, and ResourceError with the
    file's name if the machine lacks a resource.
    """
    first, position = resume
    joiner = _Joiner(options)
    for number in range(first, len(ranges)):
        start = position if number == first and position else None
        for _ in _read_into(joiner, ranges[number], number, options, start):
            yield from joiner.finished()
    joiner.finish()
    yield from joiner.finished()


class _Joiner:
    """Joins small batches and the documents of small files into larger batches."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._finished: list[tuple[ReadBatch, Place]] = []
        self._waiting: list[ReadBatch] = []
        self._builder = BatchBuilder("", options)
        self._size = self._rows = 0  # of the waiting batches
        self._place: Place = (0, 0)  # after everything that was added

    def add(self, batch: ReadBatch, place: Place) -> None:
        """Adds a batch of a file, after which reading continues at `place`."""
        self._make_room(batch.nbytes)
        self._close_builder()
        self._waiting.append(batch)
        self._size += batch.nbytes
        self._rows += batch.records.num_rows
        self._added(place)

    def add_file(self, file_range: FileRange, add_file: FileAdder, place: Place) -> None:
        """Adds the only document of a file."""
        self._make_room(file_range.file.size)
        self._builder.source = file_range.file.name
        add_file(file_range, self._builder, self._options)
        self._added(place)

    def finish(self) -> None:
        """Joins what was added since the last batch."""
        self._close_builder()
        if self._waiting:
            self._finished.append((join_batches(self._waiting), self._place))
        self._waiting, self._size, self._rows = [], 0, 0

    def finished(self) -> Iterator[tuple[ReadBatch, Place]]:
        """The batches that are complete since the last call."""
        finished, self._finished = self._finished, []
        yield from finished

    def _make_room(self, num_bytes: int) -> None:
        if self._size + self._builder.size + num_bytes > BATCH_BYTES:
            self.finish()

    def _added(self, place: Place) -> None:
        self._place = place
        size, rows = self._size + self._builder.size, self._rows + self._builder.rows
        if 2 * size >= BATCH_BYTES or rows >= BATCH_RECORDS:
            self.finish()

    def _close_builder(self) -> None:
        if not self._builder.is_empty:
            self._waiting.append(self._builder.batch(END_OF_FILE))
            self._size, self._rows = self._size + self._builder.size, self._rows + self._builder.rows
            self._builder = BatchBuilder("", self._options)


def _read_into(
    joiner: _Joiner, file_range: FileRange, number: int, options: ReadOptions, start: int | None
) -> Iterator[None]:
    """Adds range `number` from `start` on, and yields after each batch."""
    file = file_range.file
    add_file = known_format(file).add_file
    with translate_resource_errors(file.path, RESUME_ADVICE):
        if add_file is not None:
            if start != END_OF_FILE:
                joiner.add_file(file_range, add_file, (number, END_OF_FILE))
                check_unchanged(file)
                yield
            return
        is_checked = False
        for batch in read_range(file_range, options, start):
            is_checked = batch.position == END_OF_FILE
            if is_checked or not file.is_remote:
                check_unchanged(file)
            joiner.add(batch, (number, batch.position))
            yield
        if not is_checked:
            check_unchanged(file)

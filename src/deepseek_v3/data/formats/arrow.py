"""Reading Arrow IPC: the file format (also called Feather) and the stream format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from deepseek_v3.data.formats.columnar import Group, rows_per_batch

_MAGIC = b"ARROW1"


def arrow_groups(raw: BinaryIO) -> Iterator[Group]:
    """The batches of a file, or of a stream."""
    raw.seek(0)
    is_file = raw.read(len(_MAGIC)) == _MAGIC
    raw.seek(0)
    return _file_groups(raw) if is_file else _stream_groups(raw)


def _file_groups(raw: BinaryIO) -> Iterator[Group]:
    reader = pa.ipc.open_file(raw)
    # One column, best one that is small, is enough to count the rows of batches that are skipped.
    column = next((index for index, type_ in enumerate(reader.schema.types) if pa.types.is_primitive(type_)), 0)
    counter = pa.ipc.open_file(raw, options=pa.ipc.IpcReadOptions(included_fields=[column]))
    for index in range(reader.num_record_batches):
        yield Group(_count(counter, index), _batches(reader, index))


def _count(reader: pa.RecordBatchFileReader, index: int) -> int:
    """The rows of a batch; 1 where even that cannot be read."""
    try:
        return reader.get_batch(index).num_rows
    except (pa.ArrowException, OSError):
        return 1


def _batches(reader: pa.RecordBatchFileReader, index: int) -> Iterator[pa.RecordBatch]:
    yield from _cut(reader.get_batch(index))


def _stream_groups(raw: BinaryIO) -> Iterator[Group]:
    for batch in pa.ipc.open_stream(raw):
        yield Group(batch.num_rows, _cut(batch))


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate()
    size = rows_per_batch(batch.get_total_buffer_size(), batch.num_rows)
    for start in range(0, batch.num_rows, size):
        yield batch.slice(start, size)

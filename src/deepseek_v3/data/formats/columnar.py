"""Reading Parquet and Arrow IPC files (also called Feather), which store their rows in groups.

For each format a function opens a file and yields its groups. A group is read in batches of rows, and damage to a
group costs only the rows of this group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.row_sizes import cut_batch
from deepseek_v3.data.formats.streams import InputFile, open_raw, read_failure
from deepseek_v3.utils.errors import resource_problem


class RowGroup(NamedTuple):
    """A row group of Parquet or a record batch of Arrow: its number of rows, and the rows in batches of 4 MiB."""

    rows: int
    batches: Iterator[pa.RecordBatch]


# Opens a file and yields its groups in order. Both iterators may raise the errors in `_DAMAGE`.
RowGroupReader = Callable[[BinaryIO], Iterator[RowGroup]]

# pyarrow raises these for data that it cannot decode.
_DAMAGE = (pa.ArrowException, OSError, ValueError, MemoryError)
# It raises these, too, for values that no Python type can hold, such as a date in the year 10,000.
_UNWRITABLE = (*_DAMAGE, ArithmeticError, LookupError)
_AS_TEXT = {pa.binary(): pa.string(), pa.large_binary(): pa.large_string(), pa.binary_view(): pa.string_view()}
_AS_BYTES = {text: bytes_ for bytes_, text in _AS_TEXT.items()}

_ARROW_FILE_MAGIC = b"ARROW1"
_VALUE_BYTES = 8  # of a number, which Parquet may store in less
_REPEATED_BYTES = 2**10  # a column with fewer encoded bytes per value may repeat its texts
_BUFFER_BYTES = 2**20  # read at a time from each column of a Parquet file


def split_columnar(groups: RowGroupReader, file: InputFile, range_bytes: int) -> list[FileRange]:
    """Ranges of whole groups, each of about `range_bytes` of the file; a single one if it cannot be read."""
    try:
        with open_raw(file) as raw:
            rows = [group.rows for group in groups(raw)]
    except _DAMAGE:
        return [FileRange(file)]  # reading it will tell why
    rows_per_range = max(sum(rows) * range_bytes // max(file.size, 1), 1)
    starts, end = [0], 0
    for count in rows:
        if end - starts[-1] >= rows_per_range:
            starts.append(end)
        end += count
    return [FileRange(file, one, other) for one, other in zip(starts, [*starts[1:], None], strict=True)]


def read_columnar(
    groups: RowGroupReader, file_range: FileRange, options: ReadOptions, start: int | None
) -> Iterator[ReadBatch]:
    """Reads the groups that start in a range, or from row `start` on, counted from 0."""
    file, first = file_range.file, 0
    begin = file_range.start if start is None else start
    for group in _groups_or_damage(groups, file):
        if isinstance(group, InvalidRecord):
            builder = BatchBuilder(file.name, options)
            builder.reject(first + 1, group, records=0 if group.reason == "empty" else 1)
            yield builder.batch(END_OF_FILE)
            return
        if file_range.stop is not None and first >= file_range.stop:
            return
        if first + group.rows > begin:
            yield from _read_group(group, first, begin, file, options)
        first += group.rows


def arrow_groups(raw: BinaryIO) -> Iterator[RowGroup]:
    """The record batches of an Arrow file, or of an Arrow stream."""
    raw.seek(0)
    is_file = raw.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    raw.seek(0)
    return _file_groups(raw) if is_file else _stream_groups(raw)


def parquet_groups(raw: BinaryIO) -> Iterator[RowGroup]:
    """The row groups of a Parquet file. Pages with checksums are verified."""
    metadata = pq.read_metadata(raw)
    with pq.ParquetFile(
        raw,
        metadata=metadata,
        read_dictionary=_repeated_values(metadata),
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
    ) as parquet:
        for index in range(parquet.num_row_groups):
            group = metadata.row_group(index)
            values = sum(group.column(number).num_values for number in range(group.num_columns))
            size = rows_per_batch(max(group.total_byte_size, values * _VALUE_BYTES), group.num_rows)
            batches = parquet.iter_batches(size, row_groups=[index], use_threads=False)
            yield RowGroup(group.num_rows, (part for batch in batches for part in cut_batch(batch)))


def _repeated_values(metadata: pq.FileMetaData) -> list[str]:
    """The columns of texts that a file stores once for many rows, so that few bytes may hold any number of them."""
    columns = [
        metadata.row_group(index).column(number)
        for index in range(metadata.num_row_groups)
        for number in range(metadata.num_columns)
    ]
    return sorted(
        {
            column.path_in_schema
            for column in columns
            if column.physical_type == "BYTE_ARRAY"
            and column.has_dictionary_page
            and column.total_uncompressed_size < _REPEATED_BYTES * column.num_values
        }
    )


def rows_per_batch(num_bytes: int, rows: int) -> int:
    """The number of a group's rows that take about 4 MiB, at most 10,000."""
    return min(max(BATCH_BYTES * rows // max(num_bytes, 1), 1), BATCH_RECORDS)


def _file_groups(raw: BinaryIO) -> Iterator[RowGroup]:
    reader = pa.ipc.open_file(raw)
    # One column, preferably a small one, is enough to count the rows of batches that are skipped.
    column = next((index for index, type_ in enumerate(reader.schema.types) if pa.types.is_primitive(type_)), 0)
    counter = pa.ipc.open_file(raw, options=pa.ipc.IpcReadOptions(included_fields=[column]))
    for index in range(reader.num_record_batches):
        yield RowGroup(_count(counter, index), _batches(reader, index))


def _count(reader: pa.RecordBatchFileReader, index: int) -> int:
    """The rows of a batch; 1 if they cannot be counted."""
    try:
        return reader.get_batch(index).num_rows
    except (pa.ArrowException, OSError):
        return 1


def _batches(reader: pa.RecordBatchFileReader, index: int) -> Iterator[pa.RecordBatch]:
    yield from _cut(reader.get_batch(index))


def _stream_groups(raw: BinaryIO) -> Iterator[RowGroup]:
    for batch in pa.ipc.open_stream(raw):
        yield RowGroup(batch.num_rows, _cut(batch))


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate()
    yield from cut_batch(batch)


def _groups_or_damage(groups: RowGroupReader, file: InputFile) -> Iterator[RowGroup | InvalidRecord]:
    """The groups of a file; if it is damaged, the last item describes the damage."""
    try:
        with open_raw(file) as raw:
            if raw.read(1):
                yield from groups(raw)
            else:
                yield InvalidRecord("empty", "holds no bytes")
    except _DAMAGE as error:
        yield _damage(file, error)


def _read_group(
    group: RowGroup, first: int, begin: int, file: InputFile, options: ReadOptions
) -> Iterator[ReadBatch]:
    """Reads the batches of a group that start at row `begin` or later; the group's first row is row `first`."""
    end = first + group.rows
    while first < end:
        builder = BatchBuilder(file.name, options)
        try:
            batch = next(group.batches, None)
            if batch is None:
                raise InvalidRecord("damaged", "the group has fewer rows than the file says")
            batch = _with_plain_types(batch, options.text_field)
            read = batch.num_rows
        except (InvalidRecord, *_DAMAGE) as error:
            read = end - first
            builder.reject(first + 1, _damage(file, error), records=read)
        else:
            if first >= begin:
                _add_rows(batch, first, builder, options.text_field or "text")
        if read and first >= begin:
            yield builder.batch(first + read)
        first += read


def _damage(file: InputFile, error: Exception) -> InvalidRecord:
    if isinstance(error, InvalidRecord):
        return error
    if resource_problem(error):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        return read_failure(file, error)
    return InvalidRecord("damaged", f"cannot be decoded: {_one_line(error)}")


def _add_rows(batch: pa.RecordBatch, first: int, builder: BatchBuilder, text_field: str) -> None:
    """Adds the rows of a batch; its first row is row `first` of its file, counted from 0."""
    rows: list[dict[str, Any] | _RepairedRow | InvalidRecord]
    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
    except _UNWRITABLE as error:
        if resource_problem(error):
            raise
        column = text_field if text_field in batch.schema.names else text_field.partition(".")[0]
        rows = [_row(batch.slice(index, 1), column) for index in range(batch.num_rows)]
    for place, row in enumerate(rows, start=first + 1):
        try:
            if isinstance(row, InvalidRecord):
                raise row
            if isinstance(row, _RepairedRow):
                builder.add(place, row.values, row.repairs)
            else:
                builder.add(place, row)
        except InvalidRecord as why:
            builder.reject(place, why)


class _RepairedRow(NamedTuple):
    """The values of a row by column, and the codes of what was repaired in them."""

    values: dict[str, Any]
    repairs: tuple[str, ...]


def _row(row: pa.RecordBatch, text_column: str) -> _RepairedRow | InvalidRecord:
    """The row of a batch of one; values outside of the text that cannot be read become text."""
    values: dict[str, Any] = {}
    repairs: set[str] = set()
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
            values[name] = column.to_pylist()[0]
        except _UNWRITABLE as error:
            is_utf8_error = "UTF8" in str(error)
            reason = "not_utf8" if is_utf8_error else "damaged"
            if name == text_column:
                return InvalidRecord(reason, f"cannot be decoded: {_one_line(error)}")
            values[name] = _as_text(column)
            repairs.add("not_utf8" if is_utf8_error else "metadata")
    return _RepairedRow(values, tuple(sorted(repairs)))


def _as_text(column: pa.Array) -> str | None:
    """The only value of a column as text, or None if not even that can be read."""
    try:
        if pa.types.is_temporal(column.type):
            return str(column.cast(pa.string())[0].as_py())
        if column.type in _AS_BYTES:
            return bytes(column.view(_AS_BYTES[column.type])[0].as_py()).decode(errors="replace")
        return str(column.cast(_without_dates(column.type)).to_pylist()[0])
    except _UNWRITABLE:
        return None


def _without_dates(type_: pa.DataType) -> pa.DataType:
    """The type with its dates and times, which Python may not be able to hold, as integers."""
    if pa.types.is_temporal(type_):
        return pa.int32() if type_.bit_width == 32 else pa.int64()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(_without_dates(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _without_dates(field.type)) for field in type_])
    return type_


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _with_plain_types(batch: pa.RecordBatch, text_field: str | None) -> pa.RecordBatch:
    """The batch with a binary column `text_field` as UTF-8, and with nanoseconds cut to microseconds."""
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == text_field and column.type in _AS_TEXT:
            column = column.view(_AS_TEXT[column.type])
        elif pa.types.is_temporal(column.type) and getattr(column.type, "unit", None) == "ns":
            column = column.cast(_in_microseconds(column.type), safe=False)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _in_microseconds(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(type_):
        return pa.timestamp("us", type_.tz)
    return pa.duration("us") if pa.types.is_duration(type_) else pa.time64("us")

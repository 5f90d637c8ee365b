"""Writing batches to one file, whose bytes do not depend on how the rows were divided into batches."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.formats.json_values import json_default
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

_GROUP_ROWS = 8192
_GROUP_BYTES = 2**26
_ROWS_AT_A_TIME = 128
_ZSTD_LEVEL = 3
_GZIP_LEVEL = 6
_LONG = ("text", "metadata", "raw")  # columns whose values do not repeat: without dictionary and statistics
_JSON = ("metadata", "figures")  # columns that hold JSON text, written as objects to JSON lines

_VARIABLE = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)

_Write: TypeAlias = Callable[[pa.Table], None]
_Sink: TypeAlias = Callable[[Path, pa.Schema], AbstractContextManager[_Write]]


class RecordWriter:
    """Writes batches of one schema to a file that appears complete at the end of the `with` block, or not at all.

    The suffix selects the format: `.parquet` (zstd, level 3, with page checksums), or `.jsonl`, `.jsonl.zst` and
    `.jsonl.gz`, where bytes are base64 and `metadata` is an object. The file depends on the rows and their order
    alone: rows are written in groups of 8,192 rows or 64 MiB. `rows` is the number of rows so far. Raises DataError
    for any other suffix.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path, self._sink = path, _sink_of(path)
        self._files = ExitStack()
        self._schema: pa.Schema | None = None
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0

    def __enter__(self) -> RecordWriter:
        self._partial = self._files.enter_context(atomic_write(self._path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._begin(pa.schema([]))
            self._write_pending()

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows. A batch must have the columns of the first one, in any order; other columns are dropped."""
        schema = self._begin(batch.schema)
        table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
        self.rows += table.num_rows
        sizes = _row_bytes(table)
        while len(sizes):
            count = self._rows_that_fit(sizes)
            if count == 0:
                self._write_pending()
                continue
            self._pending.append(table.slice(table.num_rows - len(sizes), count))
            self._pending_rows += count
            self._pending_bytes += int(sizes[:count].sum())
            sizes = sizes[count:]

    def _begin(self, schema: pa.Schema) -> pa.Schema:
        """Opens the file with the schema of the first batch, once; returns the schema of the file."""
        if self._schema is None:
            self._schema = schema.remove_metadata()
            self._write_group = self._files.enter_context(self._sink(self._partial, self._schema))
        return self._schema

    def _rows_that_fit(self, sizes: Int64Array) -> int:
        """The number of rows, of `sizes` bytes each, that still fit the group; an empty one takes at least one."""
        by_bytes = int(np.searchsorted(np.cumsum(sizes), _GROUP_BYTES - self._pending_bytes, side="right"))
        return min(max(by_bytes, 0 if self._pending else 1), _GROUP_ROWS - self._pending_rows)

    def _write_pending(self) -> None:
        if self._pending:
            self._write_group(pa.concat_tables(self._pending).combine_chunks())
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[_Write]:
    short = [name for name in schema.names if name not in _LONG]
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=[name for name in short if name != "id"],
        write_statistics=short,
        write_page_checksum=True,
    ) as writer:
        yield lambda table: writer.write_table(table, row_group_size=table.num_rows)


@contextmanager
def _json_lines(path: Path, schema: pa.Schema) -> Iterator[_Write]:  # noqa: ARG001
    with path.open("wb") as file:
        yield lambda table: _write_lines(table, file)


@contextmanager
def _json_lines_zst(path: Path, schema: pa.Schema) -> Iterator[_Write]:  # noqa: ARG001
    compressor = zstandard.ZstdCompressor(_ZSTD_LEVEL, write_checksum=True)
    with path.open("wb") as file, compressor.stream_writer(file) as lines:
        yield lambda table: _write_lines(table, lines)


@contextmanager
def _json_lines_gz(path: Path, schema: pa.Schema) -> Iterator[_Write]:  # noqa: ARG001
    with path.open("wb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as lines:
        yield lambda table: _write_lines(table, lines)


_SINKS: dict[str, _Sink] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".jsonl.zst": _json_lines_zst,
    ".jsonl.gz": _json_lines_gz,
}


def _sink_of(path: Path) -> _Sink:
    for suffix, sink in _SINKS.items():
        if path.name.endswith(suffix):
            return sink
    raise DataError(f"{path}: cannot be written: expected one of the suffixes {', '.join(_SINKS)}")


def _write_lines(table: pa.Table, file: Any) -> None:
    """Writes rows as JSON, few at a time: five times as fast, because their objects stay in the cache."""
    names = table.schema.names
    for batch in table.to_batches(_ROWS_AT_A_TIME):
        columns = [_values(batch.column(name), name in _JSON) for name in names]
        rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
        file.write(
            b"".join([orjson.dumps(row, default=json_default, option=orjson.OPT_APPEND_NEWLINE) for row in rows])
        )


def _values(column: pa.Array, is_json: bool) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return [value and orjson.Fragment(value) for value in values] if is_json else values


def _row_bytes(table: pa.Table) -> Int64Array:
    """The approximate size of each row in bytes: int64 [rows]."""
    sizes = np.full(table.num_rows, 8 * table.num_columns, np.int64)
    for column in table.columns:
        if any(is_kind(column.type) for is_kind in _VARIABLE):
            sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return sizes

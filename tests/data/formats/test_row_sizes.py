"""Arrow data that store a value once for many rows are read in batches bounded by the size of plain values."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.formats.batches import FileRange, ReadOptions
from deepseek_v3.data.formats.reading import read_range
from deepseek_v3.data.formats.row_sizes import plain_sizes
from helpers.formats import file_of

TEXT = "word " * 100_000
VALUES = ["a" * 1000, None, "", "b" * 70_000, "a" * 1000]


def run_end_encoded(values: list[str | None]) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array(range(1, len(values) + 1), pa.int32()), pa.array(values))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(VALUES),
        pa.array(VALUES, pa.large_string()),
        pa.array([value and value.encode() for value in VALUES], pa.binary()),
        pa.array(VALUES, pa.string_view()),
        pa.array(VALUES).dictionary_encode(),
        run_end_encoded(VALUES),
        pa.array([{"x": value} for value in VALUES]),
        pa.array([[value] for value in VALUES]),
        pa.StructArray.from_arrays([pa.array(VALUES).dictionary_encode()], ["x"]),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_sizes_are_those_of_plain_values(column: pa.Array) -> None:
    sizes = plain_sizes(column)
    for size, value in zip(sizes.tolist(), VALUES, strict=True):
        assert len(value or "") <= size <= len(value or "") + 64
    assert plain_sizes(column.slice(2, 2)).tolist() == sizes[2:4].tolist()


@pytest.mark.parametrize("kind", ["a.parquet", "nested.parquet", "a.arrow", "runs.arrow", "views.arrow"])
def test_a_text_that_many_rows_share_is_read_in_small_batches(tmp_path: Path, kind: str) -> None:
    rows = 300  # 150 MB of text in a file of a few kilobytes
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [TEXT])
    columns = {"text": shared}
    if kind == "runs.arrow":
        columns = {"text": pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array([TEXT]))}
    elif kind == "views.arrow":
        view = struct.pack("<i4sii", len(TEXT), TEXT[:4].encode(), 0, 0)
        buffers = [None, pa.py_buffer(view * rows), pa.py_buffer(TEXT.encode())]
        columns = {"text": pa.Array.from_buffers(pa.string_view(), rows, buffers)}
    elif kind == "nested.parquet":
        columns = {"content": pa.StructArray.from_arrays([shared], ["text"])}
    table, path = pa.table(columns), tmp_path / kind
    if kind.endswith("parquet"):
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    options = ReadOptions("content.text" if "nested" in kind else "text")
    batches = [batch.records for batch in read_range(FileRange(file_of(path)), options)]
    assert sum(batch.num_rows for batch in batches) == rows
    assert max(batch.num_rows for batch in batches) <= 13

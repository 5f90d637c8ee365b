"""Writing: batches do not change the bytes, a file is complete or absent, and every reader reads it."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.documents import record_batch, with_column
from deepseek_v3.data.formats import writing
from deepseek_v3.data.formats.quarantine import QUARANTINED
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.data.stages import DROPPED
from deepseek_v3.utils.errors import DataError
from helpers.formats import read, texts

SUFFIXES = [".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz"]


def batch_of(count: int = 20) -> pa.RecordBatch:
    numbers = range(count)
    batch = record_batch(
        [f"id {number}" for number in numbers],
        [f"text {number} é\n" * (number % 7) for number in numbers],
        ["a.jsonl"] * count,
        list(numbers),
        [None if number % 3 else json.dumps({"url": f"u{number}"}) for number in numbers],
    )
    return with_column(batch, pa.field("quality", pa.float64()), [number / 4 for number in numbers])


def lines_of(data: bytes, suffix: str) -> list[dict[str, object]]:
    if suffix.endswith("zst"):
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    elif suffix.endswith("gz"):
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_written_as_they_are(tmp_path, suffix):
    path = tmp_path / "new" / f"part-00000{suffix}"
    batch = batch_of()
    with RecordWriter(path) as writer:
        writer.write(batch)
        assert not path.exists()
    assert writer.rows == 20
    if suffix == ".parquet":
        assert pq.read_table(path).to_pylist() == batch.to_pylist()
        column = pq.ParquetFile(path).metadata.row_group(0).column(1)
        assert (column.compression, column.path_in_schema) == ("ZSTD", "text")
    else:
        expected = batch.to_pylist()
        for row in expected:
            row["metadata"] = row["metadata"] and json.loads(row["metadata"])
        assert lines_of(path.read_bytes(), suffix) == expected
    records, quarantined = read(path)
    assert quarantined == []
    assert texts(records) == batch["text"].to_pylist()
    assert [record["id"] for record in records] == batch["id"].to_pylist()
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=8), st.sampled_from(SUFFIXES), st.integers(1, 9), st.integers(1, 2000))
def test_the_bytes_do_not_depend_on_the_batches(tmp_path_factory, cuts, suffix, group_rows, group_bytes):
    folder = tmp_path_factory.mktemp("writing")
    batch = batch_of()
    ends = sorted({0, *cuts, 20})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_GROUP_ROWS", group_rows)
        patch.setattr(writing, "_GROUP_BYTES", group_bytes)
        with RecordWriter(folder / f"whole{suffix}") as writer:
            writer.write(batch)
        with RecordWriter(folder / f"cut{suffix}") as writer:
            for start, end in pairwise(ends):
                part = batch.slice(start, end - start)
                copy = pa.RecordBatch.from_pylist(part.to_pylist(), schema=batch.schema)
                writer.write(copy if start % 2 else part)
    assert (folder / f"cut{suffix}").read_bytes() == (folder / f"whole{suffix}").read_bytes()


def test_groups_have_a_limit_of_rows_and_bytes(tmp_path, monkeypatch):
    def group_sizes(name: str) -> list[int]:
        path = tmp_path / name
        with RecordWriter(path) as writer:
            for _ in range(5):
                writer.write(batch_of(4))
        file = pq.ParquetFile(path)
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]

    assert group_sizes("a.parquet") == [20]
    monkeypatch.setattr(writing, "_GROUP_ROWS", 6)
    assert group_sizes("b.parquet") == [6, 6, 6, 2]
    monkeypatch.setattr(writing, "_GROUP_BYTES", 1)
    assert group_sizes("c.parquet") == [1] * 20


def test_other_tables_are_written_too(tmp_path):
    entry = {
        "source": "a.jsonl",
        "place": 1,
        "offset": 2,
        "length": 3,
        "records": 1,
        "reason": "not_utf8",
        "error": "é",
        "raw": b"\xff\x00",
    }
    with RecordWriter(tmp_path / "quarantine.jsonl") as writer:
        writer.write(pa.RecordBatch.from_pylist([entry], schema=QUARANTINED))
    assert lines_of((tmp_path / "quarantine.jsonl").read_bytes(), "") == [{**entry, "raw": "/wA="}]
    drop = {
        "id": "x",
        "source": "a",
        "place": 1,
        "stage": "s",
        "reason": "r",
        "figures": '{"found": 1}',
        "trigger": None,
    }
    with RecordWriter(tmp_path / "dropped.jsonl") as writer:
        writer.write(pa.RecordBatch.from_pylist([drop], schema=DROPPED))
    assert lines_of((tmp_path / "dropped.jsonl").read_bytes(), "") == [{**drop, "figures": {"found": 1}}]


def test_columns_may_come_in_another_order(tmp_path):
    batch = batch_of(3)
    with RecordWriter(tmp_path / "a.jsonl") as writer:
        writer.write(batch)
        writer.write(batch.select(batch.schema.names[::-1]))
    lines = lines_of((tmp_path / "a.jsonl").read_bytes(), "")
    assert lines[:3] == lines[3:]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_rows_give_an_empty_file(tmp_path, suffix):
    with RecordWriter(tmp_path / f"a{suffix}") as writer:
        writer.write(batch_of(0))
    with RecordWriter(tmp_path / f"b{suffix}"):
        pass
    if suffix == ".parquet":
        assert pq.read_table(tmp_path / "a.parquet").schema.names == batch_of(0).schema.names
        assert pq.read_table(tmp_path / "b.parquet").num_rows == 0
    else:
        assert lines_of((tmp_path / f"a{suffix}").read_bytes(), suffix) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_what_was_there(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("before")

    def fail() -> None:
        with RecordWriter(path) as writer:
            writer.write(batch_of())
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.csv: cannot be written: expected one of the suffixes .parquet, .jsonl"):
        RecordWriter(tmp_path / "a.csv")

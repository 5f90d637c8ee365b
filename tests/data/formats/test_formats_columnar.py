"""Parquet and Arrow: each row is a document, and damage costs at most its row group or its row."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.formats import columnar
from deepseek_v3.data.formats.batches import END_OF_FILE, FileRange, ReadOptions
from deepseek_v3.data.formats.columnar import rows_per_batch
from deepseek_v3.data.formats.reading import read_range, split_file
from helpers.formats import file_of, read, read_in_ranges, reasons, repairs, texts, write

FORMATS = ["a.parquet", "a.arrow", "a.stream.arrow"]


def save(table: pa.Table, path: Path, rows: int = 10, compression: str | None = "zstd") -> Path:
    """Writes a table in groups of `rows` rows."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows, compression=compression, write_page_checksum=True)
        return path
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def numbered(count: int = 35) -> pa.Table:
    return pa.table(
        {"text": [f"text {number} " * 9 for number in range(count)], "id": list(range(100, 100 + count))}
    )


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_documents(tmp_path, name):
    table = numbered()
    records, quarantined = read(save(table, tmp_path / name))
    assert quarantined == []
    assert texts(records) == table["text"].to_pylist()
    assert [record["id"] for record in records] == [str(number) for number in table["id"].to_pylist()]
    assert [record["place"] for record in records] == list(range(1, 36))
    assert {record["source"] for record in records} == {name}
    assert {record["metadata"] for record in records} == {None}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("range_bytes", [1, 1000, 10**6])
def test_ranges_hold_whole_groups_and_every_row_once(tmp_path, name, range_bytes, monkeypatch):
    monkeypatch.setattr(columnar, "BATCH_RECORDS", 4)
    path = save(numbered(), tmp_path / name)
    assert read_in_ranges(path, range_bytes) == read(path)
    cuts = [one.start for one in split_file(file_of(path), range_bytes)]
    assert cuts == {1: [0, 10, 20, 30], 10**6: [0]}.get(range_bytes, cuts)
    assert set(cuts) <= {0, 10, 20, 30}


def test_batches_have_about_four_mebibytes_or_ten_thousand_rows(tmp_path):
    assert rows_per_batch(2**30, 2**20) == 4096
    assert rows_per_batch(10, 10**6) == 10_000
    assert rows_per_batch(2**40, 3) == 1
    assert rows_per_batch(0, 0) == 1
    table = pa.table({"text": [f"{number:01000d}" for number in range(10_000)]})
    for name in FORMATS:
        path = save(table, tmp_path / name, rows=10_000, compression=None)
        batches = list(read_range(FileRange(file_of(path)), ReadOptions()))
        assert 3 <= len(batches) <= 4
        assert batches[-1].position == 10_000


@pytest.mark.parametrize("name", FORMATS)
def test_other_columns_become_metadata(tmp_path, name):
    day, moment = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30, 1, 250_000)
    table = pa.table(
        {
            "text": ["a"],
            "day": [day],
            "moment": pa.array([moment], pa.timestamp("us")),
            "nanoseconds": pa.array([1709209801250000123], pa.timestamp("ns", "UTC")),
            "clock": pa.array([1_000_000_001], pa.time64("ns")),
            "span": pa.array([1_500_000_000], pa.duration("ns")),
            "bytes": [b"\xff\x00"],
            "price": [decimal.Decimal("1.10")],
            "not_a_number": [float("nan")],
            "nothing": pa.nulls(1),
            "big": pa.array([2**64 - 1], pa.uint64()),
            "nested": [{"list": [1, None], "word": "é"}],
            "words": pa.array(["w"]).dictionary_encode(),
            "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    records, quarantined = read(save(table, tmp_path / name))
    assert quarantined == []
    assert json.loads(records[0]["metadata"]) == {
        "day": "2024-02-29",
        "moment": "2024-02-29T12:30:01.250000",
        "nanoseconds": "2024-02-29T12:30:01.250000+00:00",
        "clock": "00:00:01",
        "span": "0:00:01.500000",
        "bytes": "/wA=",
        "price": "1.10",
        "not_a_number": None,
        "nothing": None,
        "big": 2**64 - 1,
        "nested": {"list": [1, None], "word": "é"},
        "words": "w",
        "pairs": [["k", 1]],
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(), "dictionary"]
)
def test_text_may_be_stored_in_any_way(tmp_path, name, kind):
    content = ["one", "zwei ä", ""]
    column = pa.array(content).dictionary_encode() if kind == "dictionary" else pa.array(content, kind)
    try:
        path = save(pa.table({"text": column, "id": column}), tmp_path / name)
    except pa.ArrowNotImplementedError:
        pytest.skip("this version of pyarrow cannot write such a column")
    records, quarantined = read(path)
    assert (texts(records), quarantined) == (content, [])
    assert [record["id"] for record in records] == content


@pytest.mark.parametrize("name", FORMATS)
def test_invalid_rows_are_quarantined(tmp_path, name):
    table = pa.table({"text": ["a", None, "b\0" * 9, "c" * 50, "d"], "id": ["x", "y", "z", "u", None]})
    path = save(table, tmp_path / name)
    records, quarantined = read(path, max_record_bytes=49)
    assert [(record["text"], record["id"]) for record in records] == [("a", "x"), ("d", f"{name}:5")]
    assert [(entry["place"], entry["reason"]) for entry in quarantined] == [
        (2, "text_null"),
        (3, "nul"),
        (4, "too_long"),
    ]
    assert {(entry["offset"], entry["length"], entry["records"]) for entry in quarantined} == {(-1, -1, 1)}


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_columns_are_quarantined(tmp_path, name):
    path = save(pa.table({"body": ["a", "b"], "text": [1, 2], "id": [1.5, None]}), tmp_path / name)
    assert reasons(read(path)[1]) == ["text_type", "text_type"]
    assert reasons(read(path, text_field="content")[1]) == ["text_missing", "text_missing"]
    records, quarantined = read(path, text_field="body")
    assert [(record["text"], record["id"]) for record in records] == [("a", "1.5"), ("b", f"{name}:2")]
    assert quarantined == []


@pytest.mark.parametrize("name", FORMATS)
def test_text_inside_a_struct_is_named_with_dots(tmp_path, name):
    table = pa.table({"content": [{"body": "a", "title": "t"}], "meta": [{"key": 7}]})
    ((record,), quarantined) = read(save(table, tmp_path / name), text_field="content.body", id_field="meta.key")
    assert (record["text"], record["id"], quarantined) == ("a", "7", [])
    assert json.loads(record["metadata"]) == {"content": {"title": "t"}, "meta": {}}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", ["text", "other"])
def test_bytes_that_are_no_utf8_cost_at_most_their_row(tmp_path, name, column):
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = pa.table({"text": ["a", "b", "c"]}).set_column(0, "text", pa.array(["a", "b", "c"]))
    table = table.set_column(0, "text", broken) if column == "text" else table.append_column(column, broken)
    path = save(table, tmp_path / name)
    records, quarantined = read(path)
    if column == "text":
        assert texts(records) == ["a", "c"]
        assert [(entry["place"], entry["reason"]) for entry in quarantined] == [(2, "not_utf8")]
    else:
        assert (texts(records), quarantined, repairs(path)) == (["a", "b", "c"], [], {"not_utf8": 1})
        assert json.loads(records[1]["metadata"]) == {"other": "\ufffd"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_json_cannot_hold_becomes_text(tmp_path, name):
    times = pa.array([0, 2**62, 0], pa.timestamp("us"))
    days = pa.array([0, 2**30, 0], pa.date32())
    nested = pa.array([[{"at": 0}], [{"at": 2**61}], None], pa.list_(pa.struct([("at", pa.timestamp("ms"))])))
    table = pa.table({"text": ["a", "b", "c"], "time": times, "day": days, "nested": nested, "n": [1, 2, 3]})
    path = save(table, tmp_path / name)
    records, quarantined = read(path)
    assert (texts(records), quarantined, repairs(path)) == (["a", "b", "c"], [], {"metadata": 1})
    found = json.loads(records[1]["metadata"])
    assert {name: type(value) for name, value in found.items()} == dict.fromkeys(("time", "day", "nested"), str) | {
        "n": int
    }
    assert str(2**61) in found["nested"]


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_other_types_become_text(tmp_path, name):
    key = bytes(range(240, 256))
    for ids, found, is_repaired in (
        (pa.array([7.0, float("nan"), 0.5]), ["7", f"{name}:2", "0.5"], 2),
        (pa.array([key] * 3, pa.binary(16)), [key.hex()] * 3, 3),
        (pa.array([key, b"text", None], pa.binary()), [key.hex(), "text", f"{name}:3"], 1),
        (pa.array([True, False, None]), ["true", "false", f"{name}:3"], 2),
        (pa.array([0, 2**30, 1], pa.date32()), None, 3),
    ):
        path = save(pa.table({"text": ["a", "b", "c"], "id": ids}), tmp_path / name)
        records, quarantined = read(path)
        assert quarantined == []
        assert [record["id"] for record in records] == (found or [record["id"] for record in records])
        assert sum(repairs(path).values()) >= is_repaired


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_records_and_no_bytes_an_entry(tmp_path, name):
    assert read(save(numbered(0), tmp_path / name)) == ([], [])
    records, quarantined = read(write(tmp_path / name, b""))
    assert [(entry["reason"], entry["records"]) for entry in quarantined] == [("empty", 0)]
    assert records == []


@pytest.mark.parametrize("name", FORMATS)
def test_junk_and_truncated_files_are_quarantined(tmp_path, name):
    whole = save(numbered(), tmp_path / name).read_bytes()
    for data in (b"junk" * 100, whole[:100], whole[:-1] if ".stream" not in name else whole[:100]):
        path = write(tmp_path / name, data)
        records, quarantined = read(path)
        assert (records, reasons(quarantined)) == ([], ["damaged"])
        assert split_file(file_of(path), 1) == [FileRange(file_of(path))]


def test_a_stream_cut_short_keeps_the_batches_before(tmp_path):
    whole = save(numbered(), tmp_path / "a.stream.arrow").read_bytes()
    records, quarantined = read(write(tmp_path / "a.stream.arrow", whole[: len(whole) * 6 // 10]))
    assert texts(records) == numbered()["text"].to_pylist()[:20]
    assert [(entry["reason"], entry["place"]) for entry in quarantined] == [("damaged", 21)]


@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_damaged_page_costs_its_row_group(tmp_path, compression):
    path = save(numbered(), tmp_path / "a.parquet", compression=compression)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    assert column.path_in_schema == "text"
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 0xFF
    write(path, bytes(data))
    records, quarantined = read(path)
    content = numbered()["text"].to_pylist()
    assert texts(records) == content[:10] + content[20:]
    assert [(entry["place"], entry["records"], entry["reason"]) for entry in quarantined] == [(11, 10, "damaged")]
    assert read_in_ranges(path, 1) == (records, quarantined)


def test_the_rows_of_a_group_before_its_damaged_page_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "BATCH_RECORDS", 100)
    table = pa.table({"text": [f"{number:0100d}" for number in range(3000)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression=None, use_dictionary=False, data_page_size=10_000, write_batch_size=100)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] = 0xFF
    records, quarantined = read(write(path, bytes(data)))
    assert 1000 < len(records) < 2000
    assert texts(records) == table["text"].to_pylist()[: len(records)]
    (entry,) = quarantined
    assert entry["place"] == len(records) + 1
    assert entry["records"] == 3000 - len(records)


def test_a_damaged_arrow_batch_costs_its_rows(tmp_path):
    table = numbered().select(["id", "text"])
    path = save(table, tmp_path / "a.arrow")
    frame = bytes.fromhex("28b52ffd")
    data = path.read_bytes()
    frames = [place for place in range(len(data)) if data.startswith(frame, place)]
    content = table["text"].to_pylist()
    costs = set()
    for place in frames:
        corrupt = data[:place] + b"\0" * 4 + data[place + 4 :]
        write(path, corrupt)
        records, quarantined = read(path)
        assert read_in_ranges(path, 1) == (records, quarantined)
        (entry,) = quarantined
        assert entry["reason"] == "damaged"
        assert len(records) in (25, 30)
        assert set(texts(records)) < set(content)
        costs.add(entry["records"])
    assert costs == {10, 5, 1} or costs == {10, 5}


def test_a_column_whose_name_is_no_utf8_is_damage(tmp_path):
    data = save(numbered(), tmp_path / "a.arrow").read_bytes()
    records, quarantined = read(write(tmp_path / "a.arrow", data.replace(b"text\0", b"\xffext\0")))
    assert (records, set(reasons(quarantined))) == ([], {"damaged"})
    assert sum(entry["records"] for entry in quarantined) == 35


def test_offsets_outside_the_file_are_damage(tmp_path):
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 3, 9, 6)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abcdef")])
    table = pa.table({"id": ["x", "y", "z"], "text": column})
    records, quarantined = read(save(table, tmp_path / "a.stream.arrow", compression=None))
    assert texts(records) == ["abc"]
    assert reasons(quarantined) == ["damaged", "damaged"]


def test_a_group_with_fewer_rows_than_it_says_is_damage(tmp_path, monkeypatch):
    def groups(raw):
        yield columnar.RowGroup(5, iter([pa.RecordBatch.from_pydict({"text": ["a", "b"]})]))

    path = save(numbered(), tmp_path / "a.parquet")
    first, last = columnar.read_columnar(groups, FileRange(file_of(path)), ReadOptions(), None)
    assert first.records["text"].to_pylist() == ["a", "b"]
    assert last.quarantined.select(["place", "records", "reason"]).to_pylist() == [
        {"place": 3, "records": 3, "reason": "damaged"}
    ]
    assert last.position == 5


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_vanished_is_quarantined(tmp_path, name):
    path = save(numbered(), tmp_path / name)
    file = file_of(path)
    path.unlink()
    ((records, quarantined, position),) = read_range(FileRange(file), ReadOptions())
    assert (records.num_rows, position) == (0, END_OF_FILE)
    assert quarantined["reason"].to_pylist() == ["unreadable"]

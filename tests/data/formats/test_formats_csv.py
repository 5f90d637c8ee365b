"""CSV and TSV: what Python's csv module writes is read back, and a broken row costs itself alone."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.formats import csv_files
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.utils.errors import DataError
from helpers.formats import read, reasons, repairs, texts, write


def written(rows: list[list[str]], **dialect: object) -> bytes:
    """What Python's csv module writes."""
    target = io.StringIO(newline="")
    csv.writer(target, **dialect).writerows(rows)
    return target.getvalue().encode()


ROWS = [
    ["1", "plain", "en"],
    ["2", 'two\nlines, "quoted"', ""],
    ["3", "tab\there; and\r\nthere", "zh"],
    ["", "", "é"],
]


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("a.csv", {}),
        ("a.csv", {"delimiter": ";", "lineterminator": "\n"}),
        ("a.csv", {"delimiter": "\t", "quoting": csv.QUOTE_ALL}),
        ("a.tsv", {"delimiter": "\t"}),
        ("a.tab", {"delimiter": "\t", "lineterminator": "\n"}),
    ],
)
def test_what_the_csv_module_writes_is_read(tmp_path, name, dialect):
    data = written([["id", "text", "lang"], *ROWS], **dialect)
    for path, content in (name, data), (f"{name}.gz", gzip.compress(b"\xef\xbb\xbf" + data)):
        records, quarantined = read(write(tmp_path / path, content))
        assert quarantined == []
        assert texts(records) == [text for _, text, _ in ROWS]
        assert [json.loads(one["metadata"]) for one in records] == [{"lang": lang} for *_, lang in ROWS]
        assert [one["id"] for one in records][:3] == ["1", "2", "3"]
        assert records[3]["id"] == f"{path}:{records[3]['place']}"
        for record in records:
            rest = data[record["place"] - 3 * path.endswith(".gz") :].decode()
            assert next(csv.reader(io.StringIO(rest, newline=""), **dialect))[1] == record["text"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6), min_size=3)
        .map(lambda row: row[:3])
        .filter(any),
        max_size=8,
    ),
    st.integers(3, 60),
)
def test_any_text_survives_in_batches_of_any_size(tmp_path_factory, rows, size):
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", written([["name", "text", "x"], *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "BATCH_BYTES", size)
        patch.setattr(csv_files, "_CHUNK_BYTES", 7)
        records, quarantined = read(path)
    assert (texts(records), quarantined) == ([row[1] for row in rows], [])


def test_the_text_is_found_under_its_usual_names(tmp_path):
    path = write(tmp_path / "a.csv", ",content,label\n0,one,x\n1,two,y\n")
    records, _ = read(path, text_field=None)
    assert texts(records) == ["one", "two"]
    assert json.loads(records[1]["metadata"]) == {"": "1", "label": "y"}


def test_a_header_without_the_text_is_one_entry(tmp_path):
    records, (entry,) = read(write(tmp_path / "a.csv", "x,y\n1,2\n3,4\n"))
    assert (records, entry["reason"], entry["place"]) == ([], "text_missing", 0)
    assert entry["error"] == "the header has no column 'text', only ['x', 'y']; say which one holds the text"


def test_equal_names_of_columns_are_told_apart(tmp_path):
    (record,), _ = read(write(tmp_path / "a.csv", "text,a,a,a.1,text\none,1,2,3,other\n"))
    assert record["text"] == "one"
    assert json.loads(record["metadata"]) == {"a": "1", "a.1": "2", "a.1.1": "3", "text.1": "other"}


BROKEN = [
    ("2,two", "the row has 2 fields, the header has 3"),
    ("2,two,x,y", "the row has 4 fields, the header has 3"),
    ('2,"two"er,x', "is no row of CSV: ',' expected after '\"'"),
    ('2,"inch,x', "is no row of CSV: unexpected end of data"),
    ('2,"inch,x\n3,"foot,x', "is no row of CSV: ',' expected after '\"'"),
]


@pytest.mark.parametrize(("broken", "error"), BROKEN)
def test_a_broken_row_costs_its_lines_alone(tmp_path, broken, error):
    good = [f"{number},good {number},x\n" for number in range(9)]
    data = "id,text,x\n" + "".join(good[:4]) + broken + "\n" + "".join(good[4:])
    records, quarantined = read(write(tmp_path / "a.csv", data))
    assert texts(records) == [f"good {number}" for number in range(9)]
    assert reasons(quarantined) == ["not_csv"]
    assert error in quarantined[0]["error"]
    assert quarantined[0]["offset"] == data.index(broken)
    assert quarantined[0]["raw"].decode() == broken + "\n"


def test_a_quote_closed_nowhere_costs_lines_that_are_no_rows(tmp_path):
    data = 'id,text\n1,one\n2,"lines\nof a poem\nwithout, an end\n'
    records, (entry,) = read(write(tmp_path / "a.csv", data))
    assert texts(records) == ["one"]
    assert (entry["reason"], entry["length"]) == ("not_csv", len(data) - data.index("2,"))


def test_a_row_that_is_too_long_is_passed_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "_CHUNK_BYTES", 16)
    long = f'2,"{"a" * 50}\n{"b" * 500}"'
    data = f"id,text\n1,one\n{long}\n3,three\n4,{'c' * 200}\n5,five\n"
    records, quarantined = read(write(tmp_path / "a.csv", data), max_record_bytes=100)
    assert texts(records) == ["one", "three", "five"]
    assert [(entry["reason"], entry["raw"]) for entry in quarantined] == [("too_long", None)] * 2
    big = "x" * 300_000  # beyond the limit of the csv module
    assert texts(read(write(tmp_path / "b.csv", f"text\n{big}\n"))[0]) == [big]


@pytest.mark.parametrize(
    ("data", "reason", "error", "lost"),
    [
        (b"", "empty", "holds no bytes", 0),
        (b"\n1,2\n", "not_csv", "the first line is blank, expected the names of the columns", 1),
        ("id,text\n1,a\n".encode("utf-16"), "not_utf8", "it looks like UTF-16", 1),
        (b'id,"text\n1,a\n', "not_csv", "the header is no row: unexpected end of data", 1),
    ],
)
def test_a_file_without_a_header_is_quarantined(tmp_path, data, reason, error, lost):
    records, (entry,) = read(write(tmp_path / "a.csv", data))
    assert (records, entry["reason"], entry["records"]) == ([], reason, lost)
    assert error in entry["error"]


def test_only_a_text_that_is_not_utf8_is_lost(tmp_path):
    path = write(tmp_path / "a.csv", b"text,x\nfine,caf\xe9\ncaf\xe9,fine\n\xef\xbf\xbd,meant\n")
    records, (entry,) = read(path)
    assert texts(records) == ["fine", "\ufffd"]
    assert repairs(path) == {"not_utf8": 1}
    assert (entry["reason"], entry["offset"]) == ("not_utf8", 17)
    assert "byte 0xe9 at offset 20 is not UTF-8" in entry["error"]


def test_a_compressed_file_cut_short_keeps_whole_rows(tmp_path):
    data = gzip.compress(written([["text", "n"], *([f"row {n}", str(n * n)] for n in range(2000))]))
    for cut in range(40, len(data) - 9, len(data) // 7):
        records, (entry,) = read(write(tmp_path / "a.csv.gz", data[:cut]))
        assert entry["reason"] == "truncated"
        assert [(one["text"], one["metadata"]) for one in records] == [
            (f"row {n}", f'{{"n":"{n * n}"}}') for n in range(len(records))
        ]


def test_errors_name_the_line(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"one\ntwo"\n2\n')
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert str(caught.value) == f"{path}:4: the row has 1 fields, the header has 2"

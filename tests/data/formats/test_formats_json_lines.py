"""JSON lines: every line that is not blank is a record or quarantined, exactly once, however the file is split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from typing import NamedTuple

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.formats import json_lines
from deepseek_v3.data.formats.batches import END_OF_FILE, FileRange, ReadOptions
from deepseek_v3.data.formats.quarantine import REASONS, REPAIRS
from deepseek_v3.data.formats.reading import read_range, split_file
from helpers.formats import file_of, read, read_in_ranges, reasons, repairs, texts, write

LONGEST = 300
COMPRESSORS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
BAD = {
    b'{"text": "a"': "not_json",
    b"{'text': 'a'}": "not_json",
    b'{"text": "a"} {"text": "b"}': "not_json",
    b'{"text": "a\x01"}': "not_json",
    b"\x00\x00\x00": "not_json",
    b'["a"]': "not_object",
    b'"text"': "not_object",
    b"null": "not_object",
    b"{}": "text_missing",
    b'{"body": "a"}': "text_missing",
    b'{"text": null}': "text_null",
    b'{"text": 1}': "text_type",
    b'{"text": ["a"]}': "text_type",
    b'{"text": "' + b"a\\u0000" * 9 + b'"}': "nul",
    b'{"text": "\\u0000"}': "nul",
    b'{"text": NaN}': "text_null",
    b'{"text": "\xff"}': "not_utf8",
    b'{"text": "\xed\xa0\x80"}': "not_utf8",
    b'{"text": "a", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}": "nesting",
    b'{"text": "' + b"a" * 5000 + b'"}': "too_long",
}
# Lines that are repaired, with the document that they give: text, id, metadata, and the repairs.
REPAIRED = [
    (b'{"text": "a\\u0000b"}', "ab", None, None, ["nul"]),
    (b'{"text": "a\\ud800b\\ud83d\\ude00"}', "a\ufffdb\U0001f600", None, None, ["lone_surrogate"]),
    (b'{"text": "a", "b": {"\\udfff": 1}}', "a", None, {"b": {"\ufffd": 1}}, ["lone_surrogate"]),
    (b'{"text": "a", "x": [NaN, -Infinity, 1]}', "a", None, {"x": [None, None, 1]}, ["number"]),
    (b'{"text": "a", "x": 1e999, "y": 1.5}', "a", None, {"x": "1e999", "y": 1.5}, ["number"]),
    (b'{"text": "a", "x": ' + b"9" * 310 + b"}", "a", None, {"x": "9" * 310}, ["number"]),
    (
        b'{"text": "a", "x": NaN, "y": 12345678901234567890}',
        "a",
        None,
        {"x": None, "y": 12345678901234567890},
        ["number"],
    ),
    (b'{"text": "a", "id": true}', "a", "true", None, ["id_as_text"]),
    (b'{"text": "a", "id": 1.5}', "a", "1.5", None, ["id_as_text"]),
    (b'{"text": "a", "id": 3.0}', "a", "3", None, ["id_as_text"]),
    (b'{"text": "a", "id": ["b"]}', "a", '["b"]', None, ["id_as_text"]),
    (b'{"text": "a", "id": {"$oid": "f"}}', "a", '{"$oid": "f"}', None, ["id_as_text"]),
    (b'{"text": "a", "id": NaN}', "a", None, None, ["number"]),
    (b'{"text": "a", "x": "caf\xe9"}', "a", None, {"x": "caf\ufffd"}, ["not_utf8"]),
    (
        b'{"text": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}",
        "a",
        None,
        {"x": "[" * 500 + "]" * 500},
        ["metadata"],
    ),
]


class Line(NamedTuple):
    """A line of a file with the expected result: a text, a reason, or None if the line is blank."""

    data: bytes
    text: str | None = None
    reason: str | None = None


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
good_lines = st.builds(
    lambda text, rest, is_ascii: Line(json.dumps({**rest, "text": text}, ensure_ascii=is_ascii).encode(), text),
    plain_text,
    st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.integers(-99, 99), plain_text), max_size=2),
    st.booleans(),
)
short_bad = [Line(data, reason=reason) for data, reason in BAD.items() if len(data) <= LONGEST]
long_lines = st.integers(LONGEST + 2, 3 * LONGEST).map(lambda size: Line(b"x" * size, reason="too_long"))
blank_lines = st.sampled_from([Line(b""), Line(b"  "), Line(b"\t\r")])
lines = st.lists(
    st.one_of(good_lines, good_lines, blank_lines, st.sampled_from(short_bad), long_lines), max_size=30
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


def small_blocks(patch: pytest.MonkeyPatch, num_bytes: int = 150, records: int = 4) -> None:
    patch.setattr(json_lines, "BATCH_BYTES", num_bytes)
    patch.setattr(json_lines, "BATCH_RECORDS", records)
    patch.setattr(json_lines, "_CHUNK_BYTES", 7)


@settings(max_examples=80, deadline=None)
@given(lines, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 400), st.integers(1, 400))
def test_every_line_is_once_a_record_or_quarantined(folder, content, newline, ends, range_bytes, batch_bytes):
    data = newline.join(line.data for line in content) + (newline if ends else b"")
    path = write(folder / "a.jsonl", data)
    offsets, offset = [], 0
    for line in content:
        offsets.append(offset)
        offset += len(line.data) + len(newline)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, batch_bytes)
        records, quarantined = read(path, max_record_bytes=LONGEST + 1)
        assert read_in_ranges(path, range_bytes, max_record_bytes=LONGEST + 1) == (records, quarantined)
    places = list(zip(offsets, content, strict=True))
    expected = [(place, line.text) for place, line in places if line.text is not None]
    assert [(record["place"], record["text"]) for record in records] == expected
    assert [record["id"] for record in records] == [f"a.jsonl:{place}" for place, _ in expected]
    if data:
        rejected = [(place, line.reason) for place, line in places if line.reason is not None]
        assert [(entry["place"], entry["reason"]) for entry in quarantined] == rejected
        assert {entry["records"] for entry in quarantined} <= {1}
    for entry in quarantined:
        if entry["raw"] is not None:
            assert data[entry["offset"] :][: entry["length"]] == entry["raw"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@settings(max_examples=20, deadline=None)
@given(content=lines)
def test_compression_changes_nothing(folder, suffix, content):
    data = b"\n".join(line.data for line in content)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        plain = read(write(folder / "c.jsonl", data), max_record_bytes=LONGEST)
        packed = read(write(folder / f"c.jsonl{suffix}", COMPRESSORS[suffix](data)), max_record_bytes=LONGEST)
    renamed = json.loads(json.dumps(plain, default=repr).replace('"c.jsonl', f'"c.jsonl{suffix}'))
    assert json.loads(json.dumps(packed, default=repr)) == renamed


@pytest.mark.parametrize(("line", "text", "id_", "metadata", "codes"), REPAIRED)
def test_a_line_that_can_be_repaired_is_a_document(tmp_path, line, text, id_, metadata, codes):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    (_, record), quarantined = read(path)
    assert quarantined == []
    assert (record["text"], record["id"]) == (text, id_ or "a.jsonl:17")
    found = record["metadata"] and json.loads(record["metadata"])
    assert found == (None if metadata is None else metadata)
    assert repairs(path) == dict.fromkeys(codes, 1)
    assert {*codes} <= REPAIRS.keys()


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, line, reason):
    good = b'{"text": "good"}'
    path = write(tmp_path / "a.jsonl", good + b"\n" + line + b"\n" + good + b"\n")
    records, quarantined = read(path, max_record_bytes=4500)
    assert texts(records) == ["good", "good"]
    (entry,) = quarantined
    assert entry["reason"] == reason
    assert reason in REASONS
    assert (entry["place"], entry["offset"], entry["length"]) == (len(good) + 1, len(good) + 1, len(line))
    assert entry["raw"] == (None if reason == "too_long" else line)
    assert entry["error"]
    assert "\n" not in entry["error"]


def test_ids_and_metadata_come_from_the_other_fields(tmp_path):
    content = [
        {"id": "x", "text": "a", "url": "u", "tags": ["p", {"q": None}]},
        {"text": "b", "id": 7},
        {"text": "c", "id": None, "score": 0.5},
        {"text": "", "id": ""},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, content)))
    records, quarantined = read(path)
    assert quarantined == []
    place = len("\n".join(map(json.dumps, content[:2]))) + 1
    assert [record["id"] for record in records] == ["x", "7", f"a.jsonl:{place}", ""]
    metadata = [record["metadata"] and json.loads(record["metadata"]) for record in records]
    assert metadata == [{"url": "u", "tags": ["p", {"q": None}]}, None, {"score": 0.5}, None]


def test_fields_inside_objects_are_named_with_dots(tmp_path):
    content = [
        {"content": {"body": "inner", "title": "t"}, "meta": {"key": 3}},
        {"content.body": "outer", "content": {"body": "inner"}},
        {"content": "no object"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, content)))
    records, quarantined = read(path, text_field="content.body", id_field="meta.key")
    assert texts(records) == ["inner", "outer"]
    assert records[0]["id"] == "3"
    assert json.loads(records[0]["metadata"]) == {"content": {"title": "t"}, "meta": {}}
    assert json.loads(records[1]["metadata"]) == {"content": {"body": "inner"}}
    assert reasons(quarantined) == ["text_missing"]


def test_byte_order_marks_count_only_at_the_start(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    records, quarantined = read(path)
    assert texts(records) == ["a"]
    assert records[0]["place"] == 0
    assert reasons(quarantined) == ["not_json"]


def test_repeated_keys_are_allowed(tmp_path):
    assert texts(read(write(tmp_path / "a.jsonl", '{"text": "a", "text": "b"}'))[0]) == ["b"]


def test_utf16_is_recognised(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    records, quarantined = read(path)
    assert records == []
    assert quarantined[0]["reason"] == "not_utf8"
    assert "iconv -f utf-16" in quarantined[0]["error"]


def test_an_empty_file_is_an_entry_for_no_record(tmp_path):
    for name, data in {"a.jsonl": b"", "b.jsonl.gz": gzip.compress(b""), "c.jsonl.zst": b""}.items():
        records, quarantined = read(write(tmp_path / name, data))
        assert records == []
        assert [(entry["reason"], entry["records"]) for entry in quarantined] == [("empty", 0)]
    assert read(write(tmp_path / "d.jsonl", b"\n \n")) == ([], [])


def test_batches_end_at_four_mebibytes_or_ten_thousand_records(tmp_path):
    short = write(tmp_path / "short.jsonl", b'{"text": "a"}\n' * 25_000)
    sizes = [batch.records.num_rows for batch in read_range(FileRange(file_of(short)), ReadOptions())]
    assert sizes == [10_000, 10_000, 5_000]
    line = json.dumps({"text": "a" * 1013}).encode() + b"\n"
    assert len(line) == 1026
    long = write(tmp_path / "long.jsonl", line * 9000)
    batches = list(read_range(FileRange(file_of(long)), ReadOptions()))
    starts_within = -(-(2**22) // 1026)
    assert [batch.records.num_rows for batch in batches] == [starts_within, starts_within, 9000 - 2 * starts_within]
    assert [batch.position for batch in batches] == [starts_within * 1026, 2 * starts_within * 1026, END_OF_FILE]


def test_only_uncompressed_files_are_split(tmp_path):
    data = b'{"text": "a"}\n' * 10
    plain = file_of(write(tmp_path / "a.jsonl", data))
    assert split_file(plain, 50) == [
        FileRange(plain, 0, 50),
        FileRange(plain, 50, 100),
        FileRange(plain, 100, None),
    ]
    packed = file_of(write(tmp_path / "b.jsonl.gz", gzip.compress(data)))
    assert split_file(packed, 5) == [FileRange(packed)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_of_any_length_is_skipped_in_bounded_memory(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    with gzip.open(path, "wb", 1) if suffix else path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            file.write(b"a" * 2**20)
        file.write(b'"}\n{"text": "behind"}\n')
    tracemalloc.start()
    batches = list(read_range(FileRange(file_of(path)), ReadOptions(max_record_bytes=2**20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20
    assert [text for batch in batches for text in batch.records["text"].to_pylist()] == ["before", "behind"]
    (entry,) = [row for batch in batches for row in batch.quarantined.to_pylist()]
    assert (entry["reason"], entry["offset"], entry["raw"]) == ("too_long", 19, None)
    assert entry["length"] == 200 * 2**20 + len('{"text": ""}')


def test_a_file_that_vanished_is_quarantined(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 100)
    file = file_of(path)
    path.unlink()
    (file_range,) = split_file(file, 10)
    ((records, quarantined, position),) = read_range(file_range, ReadOptions())
    assert records.num_rows == 0
    assert quarantined["reason"].to_pylist() == ["unreadable"]
    assert "No such file" in quarantined["error"][0].as_py()
    assert list(read_range(file_range, ReadOptions(), position)) == []


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \t\n"])
def test_millions_of_blank_lines_cost_little(tmp_path, monkeypatch, blank):
    seen = []
    monkeypatch.setattr(json_lines, "_add_unusual", lambda line, *_: seen.append(line))
    good = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", good + blank * 2_000_000 + b" " + good + blank * 2_000_000)
    records, quarantined = read(path)
    assert [record["place"] for record in records] == [0, len(good) + 2_000_000 * len(blank)]
    assert quarantined == []
    assert len(seen) < 50_000  # not each of the four million


def test_a_disk_error_is_an_entry_after_the_records_before_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 3)

    class Failing:
        def __init__(self) -> None:
            self.file = path.open("rb")
            self.close = self.file.close
            self.seek = self.file.seek

        def read(self, size: int) -> bytes:
            data = self.file.read(min(size, 20))
            if not data:
                raise OSError(5, "Input/output error")
            return data

    monkeypatch.setattr("deepseek_v3.data.formats.streams.open_raw", lambda _: Failing())
    records, quarantined = read(path)
    assert texts(records) == ["a", "a", "a"]
    assert [(entry["reason"], entry["place"]) for entry in quarantined] == [("unreadable", 42)]
    assert "Input/output error" in quarantined[0]["error"]

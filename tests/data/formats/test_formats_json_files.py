"""JSON files: arrays, sequences of objects, and JSON lines under another name."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.formats import json_files
from deepseek_v3.data.formats.batches import END_OF_FILE, FileRange, ReadOptions
from deepseek_v3.data.formats.reading import read_range
from deepseek_v3.data.formats.streams import InputFile
from helpers.formats import read, reasons, texts, write

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(-1, 1), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text('ab\\"{[', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
others = st.dictionaries(st.text(max_size=3), values, max_size=3)
documents = st.builds(lambda rest, text: {**rest, "text": text}, others, plain_text)
elements = st.lists(st.one_of(documents, documents, others, values), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


def in_small_chunks(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(json_files, "_CHUNK_BYTES", size)
    patch.setattr(json_files, "BATCH_BYTES", 40)
    patch.setattr(json_files, "BATCH_RECORDS", 3)


def is_document(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and "\0" not in value["text"]


@settings(max_examples=80, deadline=None)
@given(elements, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans(), st.integers(1, 40))
def test_each_element_of_an_array_is_a_record_or_quarantined(folder, content, indent, is_ascii, marked, chunk):
    data = json.dumps(content, indent=indent, ensure_ascii=is_ascii).encode()
    path = write(folder / "a.json", (b"\xef\xbb\xbf" if marked else b"") + data + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        in_small_chunks(patch, chunk)
        found, quarantined = read(path, id_field="no such field")
    good = [value for value in content if is_document(value)]
    assert texts(found) == [value["text"] for value in good]
    for record, value in zip(found, good, strict=True):
        rest = {name: inner for name, inner in value.items() if name != "text"}
        assert json.loads(record["metadata"] or "{}") == rest
    assert len(found) + len(quarantined) == len(content)
    for entry in quarantined:
        element = path.read_bytes()[entry["offset"] :][: entry["length"]]
        assert not is_document(json.loads(element))


@settings(max_examples=50, deadline=None)
@given(st.lists(documents, min_size=1, max_size=6), st.sampled_from(["\n", " ", "", ",\n"]))
def test_objects_may_follow_one_another(folder, content, between):
    data = between.join(json.dumps(value, indent=1) for value in content)
    found, quarantined = read(write(folder / "a.json", data), id_field="no such field")
    assert (texts(found), quarantined) == ([value["text"] for value in content], [])
    decoder, offset = json.JSONDecoder(), 0
    for record in found:
        offset += len(data[offset:]) - len(data[offset:].lstrip(" \n,"))
        assert record["place"] == len(data[:offset].encode())
        offset = decoder.raw_decode(data, offset)[1]


def test_one_object_is_one_document(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"text": "a", "tags": [{"b": "]}"}]}, indent=4))
    found, quarantined = read(path)
    assert (texts(found), quarantined) == (["a"], [])
    assert found[0]["id"] == "a.json:0"


@pytest.mark.parametrize("head", ["", "\ufeff", "\n\n"])
def test_a_first_line_that_is_an_object_means_json_lines(tmp_path, head):
    data = head + '{"text": "a"}\n{"text": broken}\n\n["b"]\n{"text": "c"}'
    path = write(tmp_path / "a.json", data)
    found, quarantined = read(path)
    assert texts(found) == ["a", "c"]
    assert reasons(quarantined) == ["not_json", "not_object"]


@pytest.mark.parametrize(
    ("data", "found", "wrong"),
    [
        ("", [], ["empty"]),
        (" \n", [], []),
        ("[]", [], []),
        ("junk", [], ["not_json"]),
        ('[{"text": "a"}, {"text": NaN}, {"text": "b"}]', ["a", "b"], ["text_null"]),
        ('[{"text": "a"}, {"text" "b"}, {"text": "c"}]', ["a", "c"], ["not_json"]),
        ('[{"text": "a"}, nonsense, 5, "s", {"text": "c"},]', ["a", "c"], ["not_json", "not_object", "not_object"]),
        ('[{"text": "a"}, {"text": "b", "x": {', ["a"], ["truncated"]),
        ('[{"text": "a"}, {"text": "b', ["a"], ["truncated"]),
        ('[{"text": "a"}, {"text": "b\\', ["a"], ["truncated"]),
        ('[{"text": "a"},', ["a"], ["truncated"]),
        ('[{"text": "a"}', ["a"], ["truncated"]),
        ("[", [], ["truncated"]),
        ('[{"text": "a"}]\n', ["a"], []),
        ('[{"text": "a"}]\n[{"text": "b"}]', ["a"], ["not_json"]),
        ('[{"text": "a"}, }, {"text": "b"}]', ["a", "b"], ["not_json"]),
        ('[["a", {"text": "b"}], {"text": "c"}]', ["c"], ["not_object"]),
        ('[{"text": "' + "a" * 200 + '"}, {"text": "b"}]', ["b"], ["too_long"]),
        ('[{"text": "\\ud800"}, {"text": "b", "x": NaN}]', ["\ufffd", "b"], []),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_wrong_value_is_named_and_the_others_are_read(tmp_path, data, found, wrong, suffix):
    packed = gzip.compress(data.encode()) if suffix else data.encode()
    with pytest.MonkeyPatch.context() as patch:
        in_small_chunks(patch, 3)
        records, quarantined = read(write(tmp_path / f"a.json{suffix}", packed), max_record_bytes=150)
    assert texts(records) == found
    assert reasons(quarantined) == wrong


def test_damage_in_an_array_is_one_entry(tmp_path):
    data = gzip.compress(b'[\n{"text": "a"}, {"text": "b"}]')
    for cut in range(12, len(data)):
        records, quarantined = read(write(tmp_path / "a.json.gz", data[:cut]))
        assert texts(records) == ["a", "b"][: len(records)]
        assert reasons(quarantined) == ["truncated"]


def test_reading_continues_after_the_last_value(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "a" * 1000}] * 9000))
    file = InputFile("a.json", str(path), path.stat().st_size, "")
    batches = list(read_range(FileRange(file), ReadOptions()))
    assert [batch.records.num_rows for batch in batches] == [4137, 4137, 726]
    assert batches[-1].position == END_OF_FILE
    again = list(read_range(FileRange(file), ReadOptions(), batches[0].position))
    assert [batch.records for batch in again] == [batch.records for batch in batches[1:]]

"""WARC: pages become documents with raw HTML, and every other byte is accounted for."""

from __future__ import annotations

import gzip
import json
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.formats import warc
from deepseek_v3.data.formats.inputs import find_inputs
from deepseek_v3.utils.errors import DataError
from helpers.formats import read, reasons, skips, texts, write

HTML = "Content-Type: text/html; charset=utf-8"
HTTP = "application/http; msgtype=response"


def record(number: int, body: bytes, kind: str = "response", content_type: str = HTTP, **changes: object) -> bytes:
    headers = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "WARC-Target-URI": f"https://example.org/{number}",
        "WARC-Date": "2024-02-29T12:00:00Z",
        "Content-Type": content_type,
        "Content-Length": len(body),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"WARC/1.0\r\n{head}\r\n".encode() + body + b"\r\n\r\n"


def page(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + body


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def named(number: int, text: str = "") -> bytes:
    return record(number, page(f"<p>page {number}{text}</p>".encode(), HTML))


def test_responses_resources_and_conversions_are_documents(tmp_path):
    content = [
        record(0, b"software: test", "warcinfo", "application/warc-fields"),
        record(1, b"GET / HTTP/1.1\r\n\r\n", "request", "application/http; msgtype=request"),
        record(2, page("<p>ü</p>".encode(), HTML)),
        record(3, b"fetchTimeMs: 1", "metadata", "application/warc-fields"),
        record(4, "plain ü".encode(), "conversion", "text/plain"),
        record(5, "<b>ü</b>".encode("latin1"), "resource", "text/html; charset=ISO-8859-1"),
    ]
    data = b"".join(content)
    plain = read(write(tmp_path / "a.warc", data))
    records, quarantined = plain
    assert quarantined == []
    assert texts(records) == ["<p>ü</p>", "plain ü", "<b>ü</b>"]
    assert [one["id"] for one in records] == ["<urn:uuid:2>", "<urn:uuid:4>", "<urn:uuid:5>"]
    assert [one["place"] for one in records] == [data.index(content[number]) for number in (2, 4, 5)]
    assert json.loads(records[0]["metadata"]) == {
        "url": "https://example.org/2",
        "date": "2024-02-29T12:00:00Z",
        "content_type": "text/html; charset=utf-8",
    }
    members = b"".join(map(gzip.compress, content))
    for packed in (members, gzip.compress(data)):
        records, _ = read(write(tmp_path / "a.warc.wet.gz", packed))
        assert [one["place"] for one in records] == [one["place"] for one in plain[0]]
        assert texts(records) == texts(plain[0])


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (page("<p>café</p>".encode("latin1"), "Content-Type: text/html; charset=iso-8859-1"), "<p>café</p>"),
        (page("<p>日本</p>".encode("shift_jis"), 'Content-Type: text/html; charset="Shift_JIS"'), "<p>日本</p>"),
        (
            page('<meta charset="koi8-r">привет'.encode("koi8-r"), "Content-Type: text/html"),
            '<meta charset="koi8-r">привет',
        ),
        (page("<p>naïve café</p>".encode(), "Content-Type: text/html; charset=unheard-of"), "<p>naïve café</p>"),
        (page(b"\xef\xbb\xbf<p>marked</p>", HTML), "<p>marked</p>"),
        (page(b"<p>a\x81b\xff</p>", HTML), "<p>a�b�</p>"),
        (page(b"no type"), "no type"),
        (page(gzip.compress(b"<p>packed</p>"), HTML, "Content-Encoding: gzip"), "<p>packed</p>"),
        (page(b"<p>not packed</p>", HTML, "Content-Encoding: gzip"), "<p>not packed</p>"),
        (page(zlib.compress(b"<p>zlib</p>"), HTML, "Content-Encoding: deflate"), "<p>zlib</p>"),
        (page(raw_deflate(b"<p>raw</p>"), HTML, "Content-Encoding: deflate"), "<p>raw</p>"),
        (page(gzip.compress(b"<p>old name</p>"), HTML, "Content-Encoding: x-gzip"), "<p>old name</p>"),
        (page(b"<p>not deflated</p>", HTML, "Content-Encoding: deflate"), "<p>not deflated</p>"),
        (page(b"5\r\nhello\r\n0\r\n\r\n", HTML, "Transfer-Encoding: chunked"), "hello"),
        (page(b"<p>not in chunks</p>", HTML, "Transfer-Encoding: chunked"), "<p>not in chunks</p>"),
        (page(b"{}", "Content-Type: application/ld+json"), "{}"),
    ],
)
def test_payloads_are_decoded(tmp_path, payload, text):
    records, quarantined = read(write(tmp_path / "a.warc", record(1, payload)))
    assert (texts(records), quarantined) == ([text], [])


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (record(1, page(b"\x89PNG", "Content-Type: image/png")), "not_text"),
        (record(1, page(b"a\0b" * 9, HTML)), "nul"),
        (record(1, b"no http"), "damaged"),
        (named(1).replace(b"WARC/1.0", b"WARC/x.0"), "damaged"),
        (record(1, page(b"", HTML), WARC_Type=None), "damaged"),
        (record(1, page(b"", HTML), Content_Length=None), "damaged"),
        (record(1, page(b"", HTML), Content_Length="many"), "damaged"),
        (b"XARC/1.0\r\nContent-Length: 3\r\n\r\nabc\r\n\r\n", "damaged"),
        (b"junk" * 100 + b"\r\n\r\n", "damaged"),
        (record(1, page(b"a" * 3000, HTML)), "too_long"),
        (record(1, page(b"\x1f\x8b\x08damaged", HTML, "Content-Encoding: gzip")), "damaged"),
        (record(1, page(raw_deflate(b"a" * 3000), HTML, "Content-Encoding: deflate")), "too_long"),
        (record(1, page(gzip.compress(b"a" * 3000), HTML, "Content-Encoding: gzip")), "too_long"),
    ],
)
def test_a_damaged_record_costs_itself_alone(tmp_path, damaged, reason, monkeypatch):
    monkeypatch.setattr(warc, "_CHUNK_BYTES", 11)
    data = named(0) + damaged + named(2)
    records, quarantined = read(write(tmp_path / "a.warc", data), max_record_bytes=2000)
    assert texts(records) == ["<p>page 0</p>", "<p>page 2</p>"]
    (entry,) = quarantined
    assert (entry["reason"], entry["offset"]) == (reason, len(named(0)))
    assert entry["length"] == len(damaged.rstrip(b"\r\n")) or reason == "damaged"


def test_a_wrong_length_costs_at_most_the_next_record(tmp_path):
    short = record(1, page(b"<p>one</p>", HTML), Content_Length=60)
    records, quarantined = read(write(tmp_path / "a.warc", named(0) + short + named(2)))
    assert [texts(records)[0], texts(records)[-1]] == ["<p>page 0</p>", "<p>page 2</p>"]
    assert reasons(quarantined) == ["damaged"]
    long = record(1, page(b"<p>one</p>", HTML), Content_Length=120)
    records, quarantined = read(write(tmp_path / "a.warc", named(0) + long + named(2) + named(3)))
    assert [texts(records)[0], texts(records)[-1]] == ["<p>page 0</p>", "<p>page 3</p>"]
    assert reasons(quarantined) == ["damaged"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_cut_short_keeps_the_records_before(tmp_path, suffix):
    content = [named(number) for number in range(3)]
    data = b"".join(map(gzip.compress, content)) if suffix else b"".join(content)
    whole = len(gzip.compress(content[0])) if suffix else len(content[0])
    for cut in range(whole, len(data) - 4, 13):
        records, quarantined = read(write(tmp_path / f"a.warc{suffix}", data[:cut]))
        assert texts(records) == [f"<p>page {number}</p>" for number in range(len(records))]
        assert len(records) >= 1
        assert reasons(quarantined) in ([], ["truncated"], ["damaged"])
        assert quarantined or cut == whole or data[:cut].endswith(b"</p>\r\n\r\n")


def test_empty_files_and_files_without_records(tmp_path):
    assert [(one["reason"], one["records"]) for one in read(write(tmp_path / "a.warc", b""))[1]] == [("empty", 0)]
    assert read(write(tmp_path / "b.warc", b"\r\n\r\n")) == ([], [])
    assert reasons(read(write(tmp_path / "c.warc", bytes(range(256)) * 1000))[1]) == ["damaged"]
    ((entry,)) = read(write(tmp_path / "d.warc.gz", gzip.compress(b"junk" * 99)[:-9]))[1]
    assert entry["reason"] == "truncated"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.binary(max_size=40)), max_size=12),
    st.integers(1, 300),
    st.integers(8, 50),
)
def test_records_between_any_junk_are_found(tmp_path_factory, content, batch_bytes, chunk):
    parts = [named(part) if isinstance(part, int) else b"junk" + part + b"\r\n" for part in content]
    path = write(tmp_path_factory.mktemp("warc") / "a.warc", b"".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warc, "BATCH_BYTES", batch_bytes)
        patch.setattr(warc, "BATCH_RECORDS", 3)
        patch.setattr(warc, "_CHUNK_BYTES", chunk)
        records, quarantined = read(path)
    assert texts(records) == [f"<p>page {part}</p>" for part in content if isinstance(part, int)]
    for entry in quarantined:
        assert path.read_bytes()[entry["offset"] :].startswith(b"junk") or entry["reason"] == "empty"


def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.warc", named(0))
    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    with pytest.raises(DataError) as caught:
        find_inputs(tmp_path)
    assert str(caught.value) == f"{path}: reading WARC needs fastwarc; run `pip install 'deepseek_v3[warc]'`"


def test_raw_deflate_in_chunks_is_decoded(tmp_path):
    packed = raw_deflate(b"<p>both</p>")
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
    payload = page(chunks, HTML, "Transfer-Encoding: chunked", "Content-Encoding: deflate")
    assert texts(read(write(tmp_path / "a.warc", record(1, payload)))[0]) == ["<p>both</p>"]


@pytest.mark.parametrize("version", [b"WARC/0.18", b"WARC/1.1"])
@pytest.mark.parametrize(("in_warc", "in_http"), [(True, True), (True, False), (False, True)])
def test_headers_may_end_their_lines_with_lf_alone(tmp_path, version, in_warc, in_http):
    """ClueWeb09 is written so."""
    body = b"<p>one\r\n\r\ntwo\n</p>"
    payload = page(b"", HTML).replace(b"\r\n", b"\n") + body if in_http else page(body, HTML)
    old = record(1, payload).replace(b"WARC/1.0", version)
    header, _, block = old.partition(b"\r\n\r\n")
    if in_warc:
        old = header.replace(b"\r\n", b"\n") + b"\n\n" + block.removesuffix(b"\r\n\r\n") + b"\n\n"
    data = named(0) + old + named(2)
    records, quarantined = read(write(tmp_path / "a.warc", data))
    assert (texts(records), quarantined) == (["<p>page 0</p>", body.decode(), "<p>page 2</p>"], [])
    assert records[1]["id"] == "<urn:uuid:1>"
    assert json.loads(records[1]["metadata"])["content_type"] == "text/html; charset=utf-8"


def test_responses_of_another_status_are_counted_and_left_out(tmp_path):
    others = [301, 302, 404, 500, 206]
    pages = [page(b"<p>gone</p>", HTML).replace(b"200 OK", b"%d No" % status) for status in others]
    path = write(tmp_path / "a.warc", named(0) + b"".join(record(9, body) for body in pages) + named(2))
    assert texts(read(path)[0]) == ["<p>page 0</p>", "<p>page 2</p>"]
    assert read(path)[1] == []
    assert skips(path) == {"http_status": len(others)}
    assert skips(write(tmp_path / "b.warc", record(1, pages[0]))) == {"http_status": 1}

"""Plain text: a file is one document, or one quarantined entry with the reason."""

from __future__ import annotations

import gzip
import os

import pytest

from deepseek_v3.data.formats import plain_text
from helpers.formats import read, read_in_ranges, write


def test_a_file_is_a_document(tmp_path):
    content = "\ufeffFirst line\r\nä\n"
    for name, data in {"a.txt": content.encode(), "b.md.gz": gzip.compress(content.encode())}.items():
        path = write(tmp_path / name, data)
        ((record,), quarantined) = read(path)
        assert read_in_ranges(path, 5) == ([record], quarantined)
        assert record == {"id": name, "text": content[1:], "source": name, "place": 0, "metadata": None}
        assert quarantined == []


@pytest.mark.parametrize(
    ("data", "reason", "error"),
    [
        (b"", "empty", "holds no bytes"),
        (b"caf\xe9", "not_utf8", "byte 0xe9 at offset 3 is not UTF-8; convert the file"),
        (b"\xef\xbb\xbfcaf\xe9", "not_utf8", "byte 0xe9 at offset 6 is not UTF-8"),
        ("text".encode("utf-16"), "not_utf8", "it looks like UTF-16"),
        (b"bin\0ary" * 9, "nul", "NULs, the first is character 3"),
        (b"a" * 101, "too_long", "the file has 101 bytes, expected at most 100 (max_record_bytes)"),
        (b"a" * 1000, "too_long", "the file has 1000 bytes"),
    ],
)
def test_a_file_that_is_no_text_is_quarantined(tmp_path, data, reason, error, monkeypatch):
    monkeypatch.setattr(plain_text, "_CHUNK_BYTES", 16)
    records, (entry,) = read(write(tmp_path / "a.txt", data), max_record_bytes=100)
    assert records == []
    assert (entry["reason"], entry["length"], entry["records"]) == (reason, len(data), 1)
    assert error in entry["error"]
    assert entry["raw"] == (None if reason in ("empty", "too_long") else data)


def test_a_compressed_file_cut_short_is_no_document(tmp_path):
    records, (entry,) = read(write(tmp_path / "a.txt.gz", gzip.compress(b"text " * 99)[:-20]))
    assert (records, entry["reason"]) == ([], "truncated")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_no_bad_data(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    path.chmod(0)
    with pytest.raises(PermissionError):
        read(path)

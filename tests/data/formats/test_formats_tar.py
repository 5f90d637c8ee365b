"""Tar archives, as Python's tarfile writes them: text files are documents, and damage costs its member alone."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from deepseek_v3.data.content import content_of
from deepseek_v3.data.formats import tar_files, tar_members
from deepseek_v3.data.formats.inputs import find_inputs
from helpers.formats import read, reasons, skips, texts, write

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FILES = {
    "a.txt": b"plain\n",
    "src/main.py": b"x = 1\n",
    "docs/page.html": b"<html><body><p>Hello</p></body></html>",
    "docs/notes.md": "# Üben\n".encode(),
    "docs/old.txt.gz": gzip.compress(b"packed"),
    "README": b"read me",
    "n.ipynb": json.dumps({"cells": [{"cell_type": "markdown", "source": "a cell"}]}).encode(),
}
TEXTS = [
    "plain\n",
    "x = 1\n",
    "<html><body><p>Hello</p></body></html>",
    "# Üben\n",
    "packed",
    "read me",
    "a cell\n",
]


def archive(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT, **changes: Any) -> bytes:
    """The bytes of an archive of these files; `changes` are attributes of every member."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for attribute, value in changes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(data))
    return target.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_read_like_the_same_files_outside(tmp_path, kind):
    for name, data in FILES.items():
        write(tmp_path / "outside" / name, data)
    outside = {file.name: read(Path(file.path))[0][0] for file in find_inputs(tmp_path / "outside").files}
    path = write(tmp_path / "a.tar", archive(FILES, kind))
    records, quarantined = read(path)
    assert (texts(records), quarantined, skips(path)) == (TEXTS, [], {})
    for name, record in zip(FILES, records, strict=True):
        assert (record["id"], record["source"]) == (f"a.tar/{name}", "a.tar")
        assert json.loads(record["metadata"])["path"] == name
        assert record["text"] == outside[name]["text"]
        same = content_of(name, outside[name]["metadata"])
        assert content_of(record["source"], record["metadata"]) == same
    with tarfile.open(path) as tar:
        assert [record["place"] for record in records] == [member.offset for member in tar]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.tar.gz", gzip.compress),
        ("a.tgz", gzip.compress),
        ("a.tar.zst", zstandard.compress),
        ("a.tzst", zstandard.compress),
    ],
)
def test_compressed_archives_are_read(tmp_path, name, pack):
    records, quarantined = read(write(tmp_path / name, pack(archive(FILES))))
    assert (texts(records), quarantined) == (TEXTS, [])
    assert records[0]["id"] == f"{name}/a.txt"
    assert content_of(records[1]["source"], records[1]["metadata"]) == "code"


@pytest.mark.parametrize("kind", FORMATS)
def test_long_and_foreign_names_are_read(tmp_path, kind):
    names = ["d" * 90 + "/" + "e" * 90 + ".txt"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["ж/" * 120 + "ü.txt", "x" * 300 + ".md"]
    records, quarantined = read(write(tmp_path / "a.tar", archive(dict.fromkeys(names, b"text"), kind)))
    assert ([json.loads(one["metadata"])["path"] for one in records], quarantined) == (names, [])


def test_reading_continues_at_any_member(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_files, "BATCH_RECORDS", 2)
    records, quarantined = read(
        write(tmp_path / "a.tar", archive({f"{'n' * 150}{n}.txt": b"%d" % n for n in range(9)}))
    )
    assert (texts(records), quarantined) == ([str(n) for n in range(9)], [])


def test_links_devices_and_folders_are_no_documents(tmp_path):
    target = io.BytesIO()
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    with tarfile.open(fileobj=target, mode="w") as tar:
        for kind in kinds:
            member = tarfile.TarInfo("x.txt")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("a.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"a"))
    path = write(tmp_path / "a.tar", target.getvalue())
    assert (texts(read(path)[0]), read(path)[1]) == (["a"], [])
    assert skips(path) == {"member_type": 5}


def test_other_formats_are_counted_and_hidden_files_are_not(tmp_path):
    files = {
        "a.png": b"\x89PNG",
        "b.jsonl": b"{}",
        ".git/c.txt": b"c",
        "d/._e.txt": b"e",
        "__pycache__/m.py": b"",
        "f.txt": b"f",
    }
    path = write(tmp_path / "a.tar", archive(files))
    assert (texts(read(path)[0]), read(path)[1]) == (["f"], [])
    assert skips(path) == {"member_format": 2}


@pytest.mark.parametrize("name", ["/etc/a.txt", "../a.txt", "a/../../b.txt", "a\nb.txt", "caf\udce9.txt"])
def test_paths_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    path = write(tmp_path / "a.tar", archive({name: b"bad", "./good//b.txt": b"good"}, tarfile.GNU_FORMAT))
    (record,), (entry,) = read(path)
    assert (record["id"], record["text"]) == ("a.tar/good/b.txt", "good")
    assert entry["reason"] == "path"
    assert "has a path that is not UTF-8, or leads out of the archive" in entry["error"]
    assert list(tmp_path.rglob("*")) == [path]  # nothing was extracted


@pytest.mark.parametrize(
    ("data", "reason", "error"),
    [
        (b"", "empty", "x.txt: holds no bytes"),
        (b"caf\xe9", "not_utf8", "x.txt: byte 0xe9 at offset 3 is not UTF-8"),
        (b"a" * 101, "too_long", "x.txt: has 101 bytes, expected at most 100 (max_record_bytes)"),
    ],
)
def test_a_member_that_is_no_text_is_quarantined_alone(tmp_path, data, reason, error):
    files = {"a.txt": b"a", "x.txt": data, "b.txt": b"b"}
    records, (entry,) = read(write(tmp_path / "a.tar", archive(files)), max_record_bytes=100)
    assert (texts(records), entry["reason"]) == (["a", "b"], reason)
    assert error in entry["error"]
    bomb = {"x.txt.gz": gzip.compress(b"a" * 10**6)}
    assert reasons(read(write(tmp_path / "b.tar", archive(bomb)), max_record_bytes=2000)[1]) == ["too_long"]


def test_a_damaged_header_costs_its_member_alone(tmp_path):
    data = bytearray(archive({f"{n}.txt": b"text %d" % n for n in range(4)}, tarfile.GNU_FORMAT))
    data[1024 + 130] ^= 1  # in the second header
    records, (entry,) = read(write(tmp_path / "a.tar", bytes(data)))
    assert texts(records) == ["text 0", "text 2", "text 3"]
    assert (entry["reason"], entry["offset"], entry["length"]) == ("damaged", 1024, 1024)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_archive_cut_short_keeps_whole_members(tmp_path, suffix):
    data = archive({f"{n}.txt": b"%d" % n * 700 for n in range(3)}, tarfile.USTAR_FORMAT)
    packed = gzip.compress(data) if suffix else data
    for cut in range(3, len(packed), max(len(packed) // 40, 1)):
        records, quarantined = read(write(tmp_path / f"a.tar{suffix}", packed[:cut]))
        assert texts(records) == [str(n) * 700 for n in range(len(records))]
        is_whole = len(records) == 3 and not suffix and cut > 3 * 1536  # in the zeros at the end
        assert reasons(quarantined) in ([], ["truncated"], ["damaged"])
        assert bool(quarantined) != is_whole


def test_what_is_no_archive_is_one_entry(tmp_path):
    assert [(one["reason"], one["records"]) for one in read(write(tmp_path / "a.tar", b""))[1]] == [("empty", 0)]
    (entry,) = read(write(tmp_path / "b.tar", b"no archive " * 999))[1]
    assert (entry["reason"], entry["length"]) == ("damaged", 11 * 999)
    assert read(write(tmp_path / "c.tar", archive({}))) == ([], [])


def test_extended_headers_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "_MAX_EXTENDED_BYTES", 1000)
    data = archive({"a.txt": b"a", "x" * 5000 + ".txt": b"long", "b.txt": b"b"})
    records, quarantined = read(write(tmp_path / "a.tar", data))
    assert [texts(records)[0], texts(records)[-1]] == ["a", "b"]
    assert reasons(quarantined) == ["damaged"]
    assert "expected at most 1000" in quarantined[0]["error"]


@pytest.mark.parametrize("fields", [b"8 path=x\n", b"x path=a\n", b"12 path", b"20 size=-5\n", b"11 size=ab\n"])
def test_malformed_pax_headers_are_damage(tmp_path, fields):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(fields)
    data = header.tobuf(tarfile.USTAR_FORMAT) + fields.ljust(512, b"\0") + archive({"a.txt": b"a"})
    records, (entry,) = read(write(tmp_path / "a.tar", data))
    assert (texts(records), entry["reason"]) == (["a"], "damaged")
    assert "a pax header" in entry["error"]


def test_sizes_of_pax_headers_and_joined_archives_are_read(tmp_path):
    sized = archive({"a.txt": b"abc"}, pax_headers={"size": "3"})
    records, quarantined = read(write(tmp_path / "a.tar", sized + archive({"b.txt": b"b"})))
    assert (texts(records), quarantined) == (["abc", "b"], [])

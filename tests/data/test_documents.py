"""Reading documents: each once, in an order that does not depend on the disk; errors name the place."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.documents import Document, record_batch
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.utils.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(source: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(source, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.md", "first")
    write(tmp_path / "c.jsonl", '{"text": "third", "id": 7}\n\n{"text": "fourth"}\n')
    write(tmp_path / "d.py", "print('five')\r\n")
    assert list(read_documents(tmp_path)) == [
        Document("a/z.md", "first"),
        Document("b.txt", "second"),
        Document("7", "third"),
        Document("c.jsonl:28", "fourth"),
        Document("d.py", "print('five')\r\n"),
    ]


def test_one_file_is_a_source(tmp_path):
    assert list(read_documents(write(tmp_path / "a.txt", "text"))) == [Document("a.txt", "text")]
    lines = write(tmp_path / "b.JSONL", '{"body": "text"}')
    assert list(read_documents(lines, text_field="body")) == [Document("b.JSONL:0", "text")]


def test_hidden_files_caches_and_empty_documents_are_left_out(tmp_path):
    write(tmp_path / "seen.txt", "seen")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / "__pycache__" / "a.pyc", b"\xff")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.txt", " \n\t\n")
    write(tmp_path / "blank.jsonl", '{"text": ""}\n{"text": " "}\n')
    assert [document.id for document in read_documents(tmp_path)] == ["seen.txt"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbftext")
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "line"}')
    assert [document.text for document in read_documents(tmp_path)] == ["text", "line"]


def test_links_are_followed_and_loops_end(tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    (folder / "up").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "dangling").symlink_to(tmp_path / "missing")
    assert [document.id for document in read_documents(folder)] == ["a.txt", "linked/b.txt"]


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = error_of(tmp_path)
    assert "holds no text: found only pipe: is a broken link, or not a regular file" in message


def test_a_missing_source_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'}: does not exist" in error_of(tmp_path / "nowhere")


def test_a_source_without_text_is_an_error(tmp_path):
    assert f"{tmp_path}: holds no text" in error_of(tmp_path)
    write(tmp_path / "blank.txt", "\n")
    assert f"{tmp_path}: holds no text" in error_of(tmp_path)


def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(tmp_path):
    path = write(tmp_path / "latin.txt", "\ufeffcaf".encode() + b"\xe9 au lait")
    message = error_of(tmp_path)
    assert f"{path}: byte 0xe9 at offset 6 is not UTF-8" in message
    assert "iconv" in message


def test_an_offset_in_json_lines_counts_from_the_start(tmp_path):
    first = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n')
    assert f"{path}:2: byte 0xff at offset {len(first) + 10} is not UTF-8" in error_of(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'text': 'a'}", "is not JSON"),
        ("[" * 100_000, "is nested too deep"),
        ("9" * 10_000, "is not JSON"),
        ('["a"]', "holds a list, expected an object with a field 'text'"),
        ('{"content": "a", "b": 1}', "has no field 'text', only ['b', 'content']"),
        ('{"text": null}', "field 'text' holds null, expected a string"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "good"}) + "\n" + line + "\n")
    message = error_of(path)
    assert message.startswith(f"{path}:2: ")
    assert complaint in message


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00"}')
    assert [document.text for document in read_documents(path)] == ["😀"]


def test_invalid_values_of_an_array_are_named_by_offset(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a"}, {"text": "b", "id": "x"}]')
    assert list(read_documents(path)) == [Document("a.json:1", "a"), Document("x", "b")]
    write(path, '[{"text": "a"}, {"body": "b"}]')
    assert error_of(path).startswith(f"{path}: byte 16: has no field 'text', only ['body']")


@pytest.mark.parametrize("name", ["data/a.parquet", "data/a.jsonl", "data/a.jsonl.gz", "data/a.jsonl.zst"])
def test_the_output_of_the_pipeline_is_a_source(tmp_path, name):
    with RecordWriter(tmp_path / name) as writer:
        writer.write(record_batch(["x", "y"], ["one", "two"], ["s", "s"], [1, 2], [None, '{"u": 1}']))
    assert list(read_documents(tmp_path / "data")) == [Document("x", "one"), Document("y", "two")]


def test_a_row_and_a_line_of_a_compressed_file_are_named(tmp_path):
    table = pa.table({"text": ["a", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert error_of(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet: row 2: field 'text' holds null")
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n\n{"text": 1}\n'))
    assert error_of(path).startswith(f"{path}:3: field 'text' holds a number, expected a string")


def test_files_of_unknown_format_are_skipped_and_named(tmp_path, caplog):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "picture.png", b"\x89PNG")
    assert len(list(read_documents(tmp_path))) == 1
    assert f"{tmp_path}: 1 files are left out: picture.png (no format is known by the suffix '.png')" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    path.chmod(0)
    assert f"{path}: cannot be read" in error_of(tmp_path)


def test_disk_errors_are_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a")

    def fail(self: Path, mode: str) -> None:
        raise OSError(5, "Input/output error", str(self))

    lines = write(tmp_path / "b.jsonl", '{"text": "a"}')
    monkeypatch.setattr(Path, "open", fail)
    assert error_of(path) == f"{path}: cannot be read: Input/output error"
    assert error_of(lines) == f"{lines}: cannot be read: Input/output error"

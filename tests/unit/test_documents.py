"""Reading text: every document once, in an order that does not depend on the disk, and every fault by name."""

import json
import os
from pathlib import Path

import pytest

from deepseek_v3.data.documents import Document, read_documents
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
        Document("c.jsonl:1", "third"),
        Document("c.jsonl:3", "fourth"),
        Document("d.py", "print('five')\r\n"),
    ]


def test_one_file_is_a_source_too(tmp_path):
    assert list(read_documents(write(tmp_path / "a.txt", "text"))) == [Document("a.txt", "text")]
    lines = write(tmp_path / "b.JSONL", '{"body": "text"}')
    assert list(read_documents(lines, text_field="body")) == [Document("b.JSONL:1", "text")]


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


def test_what_is_neither_file_nor_folder_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "holds no text" in error_of(tmp_path)


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


def test_the_offset_in_json_lines_counts_from_the_start_of_the_file(tmp_path):
    first = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n')
    assert f"{path}: byte 0xff at offset {len(first) + 10} is not UTF-8" in error_of(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'text': 'a'}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 10_000, "is not JSON"),
        ('["a"]', "holds a list, expected an object with a field 'text'"),
        ('{"content": "a", "b": 1}', "has no field 'text', only ['b', 'content']"),
        ('{"text": null}', "field 'text' holds a NoneType, expected a string"),
        (r'{"text": "a\ud800b"}', r"lone surrogate '\ud800' at character 1"),
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


def test_json_that_is_not_lines_is_refused_rather_than_read_as_prose(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a"}]')
    assert f"{path}: JSON is read as .jsonl" in error_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    path.chmod(0)
    assert f"{path}: cannot be read" in error_of(tmp_path)


def test_errors_of_the_disk_are_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a")

    def fail(self: Path) -> bytes:
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert f"{path}: cannot be read: Input/output error" in error_of(tmp_path)

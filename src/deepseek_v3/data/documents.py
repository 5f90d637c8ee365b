"""Documents of text, read from a file or a folder of text files and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_v3.utils.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text, and its place below the source: a relative path, followed by `:line` in JSON lines."""

    id: str
    text: str


def read_documents(source: str | Path, text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of a file or a folder, sorted by path, leaving out those with nothing but white space.

    Each line of a `.jsonl` file is a document, whose text stands in `text_field`; any other file is one document.
    Hidden files and folders are not read, nor is `__pycache__`. Links are followed.

    Raises DataError, naming file and line or byte, where something cannot be read, is not UTF-8 or not such JSON,
    and at the end where there was no text at all.
    """
    root = Path(source)
    found = False
    try:
        if not root.exists():
            raise DataError(f"{root}: does not exist; expected a file or a folder of text")
        for path in walk_files(root):
            name = path.name if path == root else path.relative_to(root).as_posix()
            for document in _read_file(path, name, text_field):
                if document.text and not document.text.isspace():
                    found = True
                    yield document
    except OSError as error:
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    if not found:
        raise DataError(f"{root}: holds no text; expected text files, or .jsonl files with one object per line")


def walk_files(root: Path, skipped: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """Yields `root`, if it is a file, or every visible file below it, sorted by path.

    Files and folders named in `skipped` are left out. A folder that links lead to twice is entered once, so a
    link that leads back up ends there.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            status = path.stat()
            if (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                children = sorted(path.iterdir(), reverse=True)
                waiting += [c for c in children if not c.name.startswith(".") and c.name not in skipped]
        elif path.is_file():
            yield path


def check_unicode(text: str, where: str) -> None:
    """Raises DataError if `text` holds a lone surrogate: a str can, but UTF-8, and so a tokenizer, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which no UTF-8 can express; remove it, or write both halves of the pair"
        ) from None


def _read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_json_lines(path, name, text_field)
    if suffix == ".json":
        raise DataError(
            f"{path}: JSON is read as .jsonl, one object per line; convert it, for a list of objects with "
            "`jq -c '.[]'`, or move it out of the folder"
        )
    return iter([Document(name, _decode(path.read_bytes(), path))])


def _read_json_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            decoded = _decode(line, path, offset)
            offset += len(line)
            if decoded.strip():
                yield Document(f"{name}:{number}", _text_of(decoded, text_field, f"{path}:{number}"))


def _text_of(line: str, text_field: str, where: str) -> str:
    """The text in one line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}; expected one object per line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, expected an object with a field {text_field!r}")
    if text_field not in record:
        raise DataError(
            f"{where}: has no field {text_field!r}, only {sorted(record)}; say which one holds the text"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} holds a {type(text).__name__}, expected a string")
    check_unicode(text, where)
    return text


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    """Decodes bytes that stand `offset` bytes into a file, less a byte order mark at its start."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8; convert the "
            "file, for example with `iconv -f latin1 -t utf-8`, or move it away if it is no text"
        ) from None
    return text if offset else text.removeprefix("\ufeff")

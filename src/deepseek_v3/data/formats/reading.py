"""Reading the spans of an input's files into batches of records and of what is none.

FOLDED: Cutting the files of an input into spans that can be read independently.


FOLDED: Reading documents one by one, and stopping at the first thing that is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from deepseek_v3.data.documents import Document
from deepseek_v3.data.formats.batches import END_OF_FILE, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.columnar import arrow_groups, parquet_groups, read_columnar, split_columnar
from deepseek_v3.data.formats.file_types import Kind
from deepseek_v3.data.formats.inputs import InputFile, find_inputs
from deepseek_v3.data.formats.json_files import read_json
from deepseek_v3.data.formats.json_lines import read_json_lines, split_json_lines
from deepseek_v3.data.formats.plain_text import read_text
from deepseek_v3.data.formats.streams import ByteStream
from deepseek_v3.data.formats.warc import read_warc
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger

_Reader: TypeAlias = Callable[[FileRange, ReadOptions, "int | None"], Iterator[ReadBatch]]

_READERS: dict[Kind, _Reader] = {
    "json_lines": read_json_lines,
    "json": read_json,
    "parquet": partial(read_columnar, parquet_groups),
    "arrow": partial(read_columnar, arrow_groups),
    "text": read_text,
    "warc": read_warc,
}


def read_range(span: FileRange, options: ReadOptions, start: int | None = None) -> Iterator[ReadBatch]:
    """Reads a span from its beginning, or on from `start`, the position that came with one of its batches.

    A batch holds about 4 MiB or 10,000 records and depends on the content of the file alone, so reading on from a
    position gives the very batches that would have followed it. Whatever is no document is quarantined; nothing in
    a file raises. Raises DataError where a store fails, or where a library that the format needs is missing.
    """
    return iter(()) if start == END_OF_FILE else _READERS[span.file.format.kind](span, options, start)


def split_file(file: InputFile, range_bytes: int) -> list[FileRange]:
    """Cuts a file into spans of about `range_bytes`; one where its format has none.

    Local JSON lines are cut by bytes, a line belonging to the span that it starts in, Parquet by row groups and the
    Arrow file format by batches. Reading all spans in order gives the same as reading the whole.
    """
    kind = file.format.kind
    if kind == "json_lines":
        return split_json_lines(file, range_bytes)
    if kind == "parquet":
        return split_columnar(parquet_groups, file, range_bytes)
    if kind == "arrow":
        return split_columnar(arrow_groups, file, range_bytes)
    return [FileRange(file)]


_SHOWN = 3
_log = get_logger("Reading")


def read_documents(source: str | Path, text_field: str = "text", *, warn: bool = True) -> Iterator[Document]:
    """Yields the documents of a file, a folder, a pattern or an address, leaving out those that are white space.

    The files are read as `find_inputs` and `read_range` say, in the order of their names; their text stands in
    `text_field`. Files of no known format are left out, and with `warn` the log names them.

    Raises DataError, naming file and line, byte or row, where something is no document, and at the end where there
    was no text at all.
    """
    files, ignored = find_inputs(source)
    if ignored and warn:
        names = ", ".join(one.name for one in ignored[:_SHOWN])
        _log.warning(f"{source}: {len(ignored)} files are left out, of no known format: {names}")
    options = ReadOptions(text_field)
    found = False
    for file in files:
        for records, quarantined, _ in read_range(FileRange(file), options):
            _check(quarantined, file)
            for id_, text in zip(records["id"].to_pylist(), records["text"].to_pylist(), strict=True):
                if text and not text.isspace():
                    found = True
                    yield Document(id_, text)
    if not found:
        raise DataError(f"{source}: holds no text; expected text files, or records with text in {text_field!r}")


def _check(quarantined: pa.RecordBatch, file: InputFile) -> None:
    """Raises DataError at the first entry, unless that says that the file is empty."""
    for entry in quarantined.to_pylist():
        if entry["reason"] != "empty":
            where = file.path if entry["reason"] == "unreadable" else _where(file, entry["place"])
            raise DataError(f"{where}: {entry['error']}")


def _where(file: InputFile, place: int) -> str:
    kind = file.format.kind
    if kind in ("parquet", "arrow"):
        return f"{file.path}: row {place}"
    if kind == "json_lines":
        return f"{file.path}:{_line(file, place)}"
    return f"{file.path}: byte {place}" if kind != "text" else file.path


def _line(file: InputFile, offset: int) -> int:
    """The number, counted from 1, of the line that starts at a byte."""
    line = 1
    with ByteStream(file) as stream:
        while offset > 0 and (data := stream.read(min(offset, 2**20))):
            line += data.count(b"\n")
            offset -= len(data)
    return line

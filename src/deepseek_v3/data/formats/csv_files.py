"""Reading CSV (RFC 4180) and TSV: a header with the names of the columns, then one document per row.

Python's csv module parses the rows. This module hands it lines of bounded length, knows where each row starts, and
limits what a quote that is never closed can cost.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain, count
from typing import Any, NamedTuple

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, decode_utf8
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, split_suffix

_CHUNK_BYTES = 2**18
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
_NAMES_SHOWN = 20
_FIELD_CHARACTERS = 2**31 - 1  # the module's own limit of 131,072 is too small; `max_record_bytes` limits the row


def read_csv(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the rows from byte `start` on. The delimiter follows from the suffix and, for .csv, from the header."""
    csv.field_size_limit(_FIELD_CHARACTERS)
    file = file_range.file
    builder = BatchBuilder(file.name, options)
    try:
        header = _read_header(file_range, options)
    except InvalidRecord as why:
        builder.reject(0, why, offset=0, records=0 if why.reason == "empty" else 1)
        yield builder.batch(END_OF_FILE)
        return
    begin = header.length if start is None else start
    with ByteStream(file, begin) as stream:
        lines = _Lines(stream, begin, options.max_record_bytes)
        rows = csv.reader(lines, delimiter=header.delimiter, strict=True)
        while found := _next_rows(lines, rows, header):
            for row in found:
                _add(row, header.names, builder, options.id_field)
            if lines.offset - begin >= BATCH_BYTES or builder.rows >= BATCH_RECORDS:
                yield builder.batch(lines.offset)
                builder, begin = BatchBuilder(file.name, options), lines.offset
        if stream.damage:
            builder.reject(lines.row_offset, stream.damage, offset=lines.row_offset)
    yield builder.batch(END_OF_FILE)


class _Header(NamedTuple):
    """The names of the columns, the delimiter, and the length of the header in bytes."""

    names: list[str]
    delimiter: str
    length: int


class _Row(NamedTuple):
    """A row of `length` bytes at byte `offset`: its bytes, as far as they were kept, and its fields or a reason.

    A blank line has no fields.
    """

    offset: int
    length: int
    data: bytes
    fields: list[str] | InvalidRecord


class _Lines:
    """Iterates over the lines of a stream as text, for the csv module, and keeps those of the present row.

    `offset` is the byte after the last line, `row_offset` the byte at which the row starts, and `taken` holds its
    lines as bytes, up to `max_bytes` + 1 bytes of each. Bytes that are not UTF-8 are U+FFFD in the text.
    """

    def __init__(self, stream: ByteStream, offset: int, max_bytes: int) -> None:
        self.stream, self.offset, self.row_offset = stream, offset, offset
        self.taken: list[bytes] = []
        self._max_bytes = max_bytes
        self._chunk, self._at = b"", 0

    def begin_row(self) -> None:
        """Starts a row with the next line."""
        self.row_offset, self.taken = self.offset, []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._next_line()
        if not line:
            raise StopIteration
        self.taken.append(line)
        if self.offset - self.row_offset > self._max_bytes:
            raise InvalidRecord(
                "too_long",
                f"the row has more than {self._max_bytes} bytes (max_record_bytes); is its quote never closed?",
            )
        return line.decode(errors="replace")

    def _next_line(self) -> bytes:
        """The next line with its line feed; only its beginning if it is too long."""
        parts: list[bytes] = []
        length = end = 0
        while not end and (self._at < len(self._chunk) or self._advance()):
            end = self._chunk.find(b"\n", self._at) + 1
            part = self._chunk[self._at : end or len(self._chunk)]
            if length <= self._max_bytes:
                parts.append(part)
            self._at += len(part)
            length += len(part)
        line = b"".join(parts)[: self._max_bytes + 1]
        is_first = self.offset == 0
        self.offset += length
        return line.removeprefix(BYTE_ORDER_MARK) if is_first else line

    def _advance(self) -> bool:
        self._chunk, self._at = self.stream.read(_CHUNK_BYTES), 0
        return bool(self._chunk)


def _read_header(file_range: FileRange, options: ReadOptions) -> _Header:
    """Reads the first row. Raises InvalidRecord if the file has none, or if it names no column for the text."""
    with ByteStream(file_range.file) as stream:
        lines = _Lines(stream, 0, options.max_record_bytes)
        first = next(lines, "")
        if stream.damage:
            raise stream.damage
        if not first:
            raise InvalidRecord("empty", "holds no bytes")
        delimiter = max(_DELIMITERS[split_suffix(file_range.file.name)[0]], key=first.count)
        try:
            names = next(csv.reader(chain([first], lines), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise InvalidRecord("not_csv", f"the header is no row: {error}") from None
        decode_utf8(b"".join(lines.taken), 0)
    if not names:
        raise InvalidRecord("not_csv", "the first line is blank, expected the names of the columns")
    text_field = options.text_field or "text"
    if text_field not in names:
        shown = ", ".join(map(repr, names[:_NAMES_SHOWN]))
        raise InvalidRecord(
            "text_missing", f"the header has no column {text_field!r}, only [{shown}]; say which one holds the text"
        )
    return _Header(_unique(names), delimiter, lines.offset)


def _unique(names: list[str]) -> list[str]:
    """The names, of which those that occur again end with .1, .2 and so on."""
    unique: dict[str, None] = {}
    for name in names:
        candidates = chain([name], (f"{name}.{number}" for number in count(1)))
        unique[next(one for one in candidates if one not in unique)] = None
    return [*unique]


def _next_rows(lines: _Lines, rows: Iterator[list[str]], header: _Header) -> list[_Row]:
    """The next row, or several of them if a quote was not closed; none at the end, or where the damage begins."""
    lines.begin_row()
    begin, columns = lines.row_offset, len(header.names)
    found: list[str] | InvalidRecord
    try:
        found = next(rows)
        if len(found) not in (0, columns):
            found = InvalidRecord("not_csv", f"the row has {len(found)} fields, the header has {columns}")
    except StopIteration:
        return []
    except csv.Error as error:
        found = InvalidRecord("not_csv", f"is no row of CSV: {error}")
    except InvalidRecord as too_long:
        found = too_long
    if lines.stream.damage and not lines.taken[-1].endswith(b"\n"):
        return []
    if isinstance(found, InvalidRecord) and (several := _after_stray_quote(lines.taken, begin, found, header)):
        return several
    return [_Row(begin, lines.offset - begin, b"".join(lines.taken), found)]


def _after_stray_quote(taken: list[bytes], begin: int, why: InvalidRecord, header: _Header) -> list[_Row]:
    """The lines of a broken row, each as a row, if most of those after the first one are rows by themselves.

    Then a quote in the first line was not meant as one. Else the lines belong together, and there are none.
    """
    columns, offset = len(header.names), begin
    rows: list[_Row] = []
    for number, line in enumerate(taken):
        fields = _single_row(line, header.delimiter) if number else None
        is_row = fields is not None and len(fields) == columns
        rows.append(_Row(offset, len(line), line, fields if fields is not None and is_row else why))
        offset += len(line)
    whole = sum(isinstance(row.fields, list) for row in rows)
    return rows if columns > 1 and 2 * whole > len(rows) - 1 else []


def _single_row(line: bytes, delimiter: str) -> list[str] | None:
    try:
        return next(csv.reader([line.decode(errors="replace")], delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _add(row: _Row, names: list[str], builder: BatchBuilder, id_field: str) -> None:
    """Adds a row as a document. An empty id counts as none."""
    try:
        if isinstance(row.fields, InvalidRecord):
            raise row.fields
        if not row.fields:
            return
        record: dict[str, Any] = dict(zip(names, row.fields, strict=True))
        if record.get(id_field) == "":
            del record[id_field]
        not_utf8 = _not_utf8(row) if any("\ufffd" in field for field in row.fields) else None
        builder.add(row.offset, record, ("not_utf8",) if not_utf8 else (), not_utf8)
    except InvalidRecord as why:
        raw = None if why.reason == "too_long" else row.data
        builder.reject(row.offset, why, offset=row.offset, length=row.length, raw=raw)


def _not_utf8(row: _Row) -> InvalidRecord | None:
    """Why the bytes of a row are not UTF-8; None if they are, and the row holds U+FFFD itself."""
    try:
        decode_utf8(row.data, row.offset)
    except InvalidRecord as why:
        return why
    return None

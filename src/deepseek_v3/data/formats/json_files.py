"""Reading JSON files: an array of objects, objects one after the other, or JSON lines under another name.

A scanner finds where the values end, without parsing them, so a file of any length is read in bounded memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.json_lines import read_json_lines
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_HEAD_BYTES = 2**20
_CHUNK_BYTES = 2**18
_SEPARATORS = re.compile(rb"[\s,]*")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_END_OF_WORD = re.compile(rb'[\s,"{}\[\]]')


def read_json(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the elements of an array, or the values of a sequence, from the value at byte `start` on.

    A file whose first line is a complete object is read as JSON lines.
    """
    with ByteStream(file_range.file) as stream:
        head = stream.read(_HEAD_BYTES)
    mark = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
    head = head[mark:].lstrip()
    if not head.startswith((b"[", b"{")) or _is_object(head.partition(b"\n")[0]):
        yield from read_json_lines(file_range, options, start)
        return
    begin = start or mark
    with ByteStream(file_range.file, begin) as stream:
        elements = _ElementReader(stream, begin, head.startswith(b"["), options.max_record_bytes)
        if not start and elements.in_array:
            elements.values.skip_separators()
            elements.values.skip_byte()
        while not elements.at_end:
            builder = BatchBuilder(file_range.file.name, options)
            elements.add_to(builder)
            if not builder.is_empty:
                yield builder.batch(END_OF_FILE if elements.at_end else elements.values.offset)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


class _ElementReader:
    """Reads the elements of an array, or the values of a sequence, to the end of the file."""

    def __init__(self, stream: ByteStream, offset: int, in_array: bool, max_bytes: int) -> None:
        self.values = JsonValueScanner(stream, offset, max_bytes)
        self.in_array = in_array
        self.at_end = False
        self._stream, self._max_bytes = stream, max_bytes

    def add_to(self, builder: BatchBuilder) -> None:
        """Adds about 4 MiB of values, at most 10,000, and rejects the end of a damaged file."""
        stop = self.values.offset + BATCH_BYTES
        for _ in range(BATCH_RECORDS):
            following = self.values.skip_separators()
            is_closed = self.in_array and following == b"]"
            if is_closed or not following:
                self.at_end = True
                self._check_end(is_closed, builder)
            else:
                self._add(self.values.next_value(), builder)
            if self.at_end or self.values.offset >= stop:
                return

    def _add(self, value: JsonValue, builder: BatchBuilder) -> None:
        offset, length, data, is_whole = value
        try:
            if not is_whole:
                self.at_end = True
                raise self._stream.damage or InvalidRecord("truncated", "the file ends inside this value")
            if data is None:
                raise InvalidRecord(
                    "too_long", f"has {length} bytes, expected at most {self._max_bytes} (max_record_bytes)"
                )
            builder.add_json(offset, data, offset)
        except InvalidRecord as why:
            builder.reject(offset, why, offset=offset, length=length, raw=data)

    def _check_end(self, is_closed: bool, builder: BatchBuilder) -> None:
        why = None
        if is_closed:
            self.values.skip_byte()
            if self.values.skip_separators():
                why = InvalidRecord("not_json", "continues after the end of its array; expected one array")
        elif self.in_array:
            why = InvalidRecord("truncated", "the file ends before its array is closed")
        if why := self._stream.damage or why:
            builder.reject(self.values.offset, why, offset=self.values.offset)


class JsonValue(NamedTuple):
    """A value of `length` bytes at byte `offset`.

    `data` holds its bytes; it is None if the value is too long. `is_whole` is False if the file ends inside the
    value.
    """

    offset: int
    length: int
    data: bytes | None
    is_whole: bool


class JsonValueScanner:
    """Finds the values of a stream that are separated by any white space and commas."""

    def __init__(self, stream: ByteStream, offset: int, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._data, self._at = b"", 0
        self._passed = offset  # the offset of the first byte of _data

    @property
    def offset(self) -> int:
        """The byte after the last value."""
        return self._passed + self._at

    def skip_separators(self) -> bytes:
        """Skips white space and commas, and returns the byte after them, or b"" at the end of the stream."""
        while True:
            match = _SEPARATORS.match(self._data, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._data) or not self._advance():
                return self._data[self._at : self._at + 1]

    def skip_byte(self) -> None:
        """Skips the byte that `skip_separators` returned."""
        self._at += 1

    def next_value(self) -> JsonValue:
        """The value that starts at the next byte. To find its end, counts brackets of both kinds together."""
        offset, length = self.offset, 0
        parts: list[bytes] = []
        end_finder = _EndFinder(is_word=self._data[self._at] not in b'{["')
        is_whole = False
        while not is_whole:
            end = end_finder.end_in(self._data, self._at)
            is_whole = end >= 0
            part = self._data[self._at : end if is_whole else None]
            self._at += len(part)
            length += len(part)
            if length <= self._max_bytes:
                parts.append(part)
            else:
                parts.clear()
            if not is_whole and not self._advance():
                break
        data = b"".join(parts) if length <= self._max_bytes else None
        return JsonValue(offset, length, data, is_whole or end_finder.is_word)

    def _advance(self) -> bool:
        """Reads the next chunk of the stream, and returns whether there is one."""
        self._passed += len(self._data)
        self._data, self._at = self._stream.read(_CHUNK_BYTES), 0
        return bool(self._data)


class _EndFinder:
    """Finds the end of one value by its state: bracket depth, inside a string, or inside a word such as null."""

    def __init__(self, is_word: bool) -> None:
        self.is_word = is_word
        self._depth = 0
        self._in_string = False
        self._skips_one = is_word  # the first byte of a word is part of it, whatever it is

    def end_in(self, data: bytes, at: int) -> int:
        """The index after the value's end, or -1 if the value continues after `data`."""
        while at < len(data):
            if self._skips_one:
                self._skips_one = False
                at += 1
                continue
            if self.is_word:
                match = _END_OF_WORD.search(data, at)
                return match.start() if match else -1
            match = (_IN_STRING if self._in_string else _STRUCTURE).search(data, at)
            if match is None:
                return -1
            at = match.end()
            self._update(match[0])
            if self._depth == 0 and not self._in_string:
                return at
        return -1

    def _update(self, sign: bytes) -> None:
        if sign == b'"':
            self._in_string = not self._in_string
        elif sign == b"\\":
            self._skips_one = True
        else:
            self._depth += 1 if sign in b"{[" else -1

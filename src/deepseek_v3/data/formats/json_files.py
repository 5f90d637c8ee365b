"""Reading JSON files: an array of objects, objects one after the other, or in fact JSON lines.

FOLDED: Finding where JSON values end in a stream of any length, without parsing them.
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
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, parse_json
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_PIECE_BYTES = 2**18
_BETWEEN = re.compile(rb"[\s,]*")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_BEHIND_WORD = re.compile(rb'[\s,"{}\[\]]')


class Value(NamedTuple):
    """The `length` bytes of a value at byte `offset`: None if too many, and cut short if it is not whole."""

    offset: int
    length: int
    data: bytes | None
    is_whole: bool


class Values:
    """The values of a stream, whatever white space and commas stand between them."""

    def __init__(self, stream: ByteStream, offset: int, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._data, self._at = b"", 0
        self._passed = offset  # the offset of the first byte of _data

    @property
    def offset(self) -> int:
        """The byte behind the last value."""
        return self._passed + self._at

    def skip(self) -> bytes:
        """Leaves out white space and commas; returns the byte behind them, or none at the end of the stream."""
        while True:
            match = _BETWEEN.match(self._data, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._data) or not self._advance():
                return self._data[self._at : self._at + 1]

    def step(self) -> None:
        """Leaves out the byte that `skip` returned."""
        self._at += 1

    def next_value(self) -> Value:
        """The value that starts here. Its brackets are matched by number, not by kind."""
        offset, length = self.offset, 0
        parts: list[bytes] = []
        scanner = _Scanner(is_word=self._data[self._at] not in b'{["')
        is_whole = False
        while not is_whole:
            end = scanner.end_in(self._data, self._at)
            is_whole = end >= 0
            part = self._data[self._at : end if is_whole else None]
            self._at += len(part)
            length += len(part)
            if length <= self._longest:
                parts.append(part)
            else:
                parts.clear()
            if not is_whole and not self._advance():
                break
        data = b"".join(parts) if length <= self._longest else None
        return Value(offset, length, data, is_whole or scanner.is_word)

    def _advance(self) -> bool:
        """Goes on to the next piece of the stream, once this one is used up."""
        self._passed += len(self._data)
        self._data, self._at = self._stream.read(_PIECE_BYTES), 0
        return bool(self._data)


class _Scanner:
    """Where in a value we are: between brackets, in a string, behind a backslash, or in a word such as null."""

    def __init__(self, is_word: bool) -> None:
        self.is_word = is_word
        self._depth = 0
        self._in_string = False
        self._skips_one = is_word  # whatever a word starts with is part of it

    def end_in(self, data: bytes, at: int) -> int:
        """The index behind the value's end, or -1 if it goes on behind `data`."""
        while at < len(data):
            if self._skips_one:
                self._skips_one = False
                at += 1
                continue
            if self.is_word:
                match = _BEHIND_WORD.search(data, at)
                return match.start() if match else -1
            match = (_IN_STRING if self._in_string else _STRUCTURE).search(data, at)
            if match is None:
                return -1
            at = match.end()
            self._pass(match[0])
            if self._depth == 0 and not self._in_string:
                return at
        return -1

    def _pass(self, sign: bytes) -> None:
        if sign == b'"':
            self._in_string = not self._in_string
        elif sign == b"\\":
            self._skips_one = True
        else:
            self._depth += 1 if sign in b"{[" else -1


_HEAD_BYTES = 2**20


def read_json(span: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the elements of an array, or values one after the other, from that at byte `start` on.

    A file whose first line is an object by itself holds JSON lines, and is read as such.
    """
    with ByteStream(span.file) as stream:
        head = stream.read(_HEAD_BYTES)
    mark = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
    head = head[mark:].lstrip()
    if not head.startswith((b"[", b"{")) or _is_object(head.partition(b"\n")[0]):
        yield from read_json_lines(span, options, start)
        return
    begin = start or mark
    with ByteStream(span.file, begin) as stream:
        values = _Elements(stream, begin, head.startswith(b"["), options.max_record_bytes)
        if not start and values.in_array:
            values.skip()
            values.step()
        while not values.at_end:
            collector = BatchBuilder(span.file.name, options)
            values.collect(collector)
            if not collector.is_empty:
                yield collector.batch(END_OF_FILE if values.at_end else values.offset)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


class _Elements(Values):
    """The elements of an array, or the values of a sequence, up to the end of the file."""

    def __init__(self, stream: ByteStream, offset: int, in_array: bool, longest: int) -> None:
        super().__init__(stream, offset, longest)
        self.in_array = in_array
        self.at_end = False

    def collect(self, collector: BatchBuilder) -> None:
        """Takes about 4 MiB of values, at most 10,000, and notes what is wrong with the end of the file."""
        stop = self.offset + BATCH_BYTES
        for _ in range(BATCH_RECORDS):
            following = self.skip()
            is_closed = self.in_array and following == b"]"
            if is_closed or not following:
                self.at_end = True
                self._check_end(is_closed, collector)
            else:
                self._take(self.next_value(), collector)
            if self.at_end or self.offset >= stop:
                return

    def _take(self, value: Value, collector: BatchBuilder) -> None:
        offset, length, data, is_whole = value
        try:
            if not is_whole:
                self.at_end = True
                raise self._stream.damage or InvalidRecord("truncated", "the file ends inside this value")
            if data is None:
                raise InvalidRecord(
                    "too_long", f"has {length} bytes, expected at most {self._longest} (max_record_bytes)"
                )
            collector.add(offset, parse_json(data, offset))
        except InvalidRecord as why:
            collector.reject(offset, why, offset=offset, length=length, raw=data)

    def _check_end(self, is_closed: bool, collector: BatchBuilder) -> None:
        why = None
        if is_closed:
            self.step()
            if self.skip():
                why = InvalidRecord("not_json", "goes on behind the end of its array; expected one array")
        elif self.in_array:
            why = InvalidRecord("truncated", "the file ends before its array is closed")
        if why := self._stream.damage or why:
            collector.reject(self.offset, why, offset=self.offset)

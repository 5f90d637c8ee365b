"""Finding where JSON values end in a stream of any length, without parsing them."""

from __future__ import annotations

import re
from typing import NamedTuple

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

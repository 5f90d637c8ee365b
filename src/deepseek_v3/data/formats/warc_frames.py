"""Where WARC records begin and end in a stream, and what is left of those that are damaged."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from deepseek_v3.data.formats.quarantine import Rejected
from deepseek_v3.data.formats.streams import ByteStream

_HEADER_BYTES = 2**16
_PIECE_BYTES = 2**18
_KIND = re.compile(rb"^WARC-Type:[ \t]*(\w+)", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d{1,18})[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_NEXT_RECORD = re.compile(rb"\nWARC/\d")
_OVERLAP = 6  # bytes of a match that may end one piece


class Frame(NamedTuple):
    """A record of `length` bytes at byte `offset`: header, blank line and block, or why they cannot be had."""

    offset: int
    length: int
    data: bytes | Rejected


class Frames:
    """Cuts a stream into WARC records of the given kinds, and passes over all others."""

    def __init__(self, stream: ByteStream, offset: int, longest: int, kinds: Collection[bytes]) -> None:
        self._stream, self._longest, self._kinds = stream, longest, kinds
        self.offset = offset
        self.at_end = False

    def next_frame(self) -> Frame | None:
        """The next record, or None where it is of another kind or there is none."""
        data = self._stream.read(_HEADER_BYTES)
        blank = len(data) - len(data.lstrip(b"\r\n"))
        self.offset += blank
        if blank == len(data):
            self.at_end = len(data) < _HEADER_BYTES
            damage = self._stream.damage if self.at_end else None
            return Frame(self.offset, 0, damage) if damage else None
        end = data.find(b"\r\n\r\n", blank) + 4
        header = data[blank:end] if data.startswith(b"WARC/", blank) and end > blank else b""
        kind, length = _KIND.search(header), _LENGTH.search(header)
        if kind is None or length is None:
            return self._lost(data[blank:], len(data) < _HEADER_BYTES)
        self._stream.unread(len(data) - end)
        return self._record(header, int(length[1]), kind[1].lower() in self._kinds)

    def _record(self, header: bytes, length: int, is_wanted: bool) -> Frame | None:
        parts, missing = [header], length
        while missing > 0 and (part := self._stream.read(min(missing, _PIECE_BYTES))):
            if is_wanted and length <= self._longest:
                parts.append(part)
            missing -= len(part)
        offset, found = self.offset, len(header) + length - missing
        self.offset += found
        if missing:
            self.at_end = True
            cut = Rejected("truncated", f"the file ends {missing} bytes before the end of this record")
            return Frame(offset, found, self._stream.damage or cut)
        if not is_wanted:
            return None
        if length > self._longest:
            error = f"the record has {length} bytes, expected at most {self._longest} (max_record_bytes)"
            return Frame(offset, found, Rejected("too_long", error))
        return Frame(offset, found, b"".join(parts))

    def _lost(self, data: bytes, is_last: bool) -> Frame:
        """Passes over what is no record, up to the next one; `data` were read last, `is_last` from the file."""
        offset = self.offset
        while True:
            match = _NEXT_RECORD.search(data)
            self.at_end = match is None and is_last
            again = len(data) - match.start() - 1 if match else 0 if is_last else _OVERLAP
            self._stream.unread(again)
            self.offset += len(data) - again
            if match or is_last:
                break
            data = self._stream.read(_PIECE_BYTES)
            is_last = len(data) < _PIECE_BYTES
        damage = self._stream.damage if self.at_end else None
        lost = Rejected("damaged", "expected a WARC record with WARC-Type and Content-Length, found other bytes")
        return Frame(offset, self.offset - offset, damage or lost)

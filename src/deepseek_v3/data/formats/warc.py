"""Reading WARC: the responses, resources and conversions of a web archive (ISO 28500).

FOLDED: Where WARC records begin and end in a stream, and what is left of those that are damaged.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.inputs import archive_iterator
from deepseek_v3.data.formats.quarantine import InvalidRecord
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
    data: bytes | InvalidRecord


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
            cut = InvalidRecord("truncated", f"the file ends {missing} bytes before the end of this record")
            return Frame(offset, found, self._stream.damage or cut)
        if not is_wanted:
            return None
        if length > self._longest:
            error = f"the record has {length} bytes, expected at most {self._longest} (max_record_bytes)"
            return Frame(offset, found, InvalidRecord("too_long", error))
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
        lost = InvalidRecord(
            "damaged", "expected a WARC record with WARC-Type and Content-Length, found other bytes"
        )
        return Frame(offset, self.offset - offset, damage or lost)


_KINDS = (b"response", b"resource", b"conversion")
_TEXT_TYPE = re.compile(r"text/|application/([\w.-]+\+)?(xhtml|xml|json)\b|$", re.IGNORECASE)
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)


def read_warc(span: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the records from byte `start` on. Other kinds, such as requests, are no documents and left out."""
    begin = start or 0
    parser = archive_iterator(span.file.path)
    with ByteStream(span.file, begin) as stream:
        frames = Frames(stream, begin, options.max_record_bytes, _KINDS)
        while not frames.at_end:
            collector = BatchBuilder(span.file.name, options)
            for frame in _some(frames):
                _take(frame, span.file.name, collector, options, parser)
            if frames.at_end and frames.offset == 0 and not stream.damage:
                collector.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
            if not collector.is_empty:
                yield collector.batch(END_OF_FILE if frames.at_end else frames.offset)


def _some(frames: Frames) -> Iterator[Frame]:
    """The next records, about 4 MiB, at most 10,000."""
    stop = frames.offset + BATCH_BYTES
    for _ in range(BATCH_RECORDS):
        frame = frames.next_frame()
        if frame:
            yield frame
        if frames.at_end or frames.offset >= stop:
            return


def _take(frame: Frame, source: str, collector: BatchBuilder, options: ReadOptions, parser: Any) -> None:
    offset, length, data = frame
    try:
        if isinstance(data, InvalidRecord):
            raise data
        record, body = _parsed(data, parser, options.max_record_bytes)
        id_ = record.headers.get("WARC-Record-ID") or f"{source}:{offset}"
        content_type = (record.http_headers if record.is_http else record.headers).get("Content-Type") or ""
        if not _TEXT_TYPE.match(content_type):
            raise InvalidRecord("not_text", f"the record holds {content_type}, expected text")
        metadata = {
            "url": record.headers.get("WARC-Target-URI"),
            "date": record.headers.get("WARC-Date"),
            "content_type": content_type or None,
        }
        collector.add_text(offset, id_, _decoded(body, content_type, record), metadata)
    except InvalidRecord as why:
        raw = data if isinstance(data, bytes) else None
        collector.reject(offset, why, offset=offset, length=length, raw=raw)


def _parsed(data: bytes, parser: Any, longest: int, decoding: str = "all") -> tuple[Any, bytes]:
    """A record and its payload, without the encodings of the transfer, or as it is where they are not kept to."""
    try:
        record = next(iter(parser(io.BytesIO(data), auto_decode=decoding)), None)
        body = record.reader.read(longest + 1) if record else b""
    except OSError as error:
        if decoding == "all":
            return _parsed(data, parser, longest, "none")
        raise InvalidRecord("damaged", f"is no WARC record: {error}") from None
    if record is None or (record.is_http and record.http_headers.status_code is None):
        raise InvalidRecord("damaged", "the record holds no HTTP response, though it says so")
    if len(body) > longest:
        raise InvalidRecord("too_long", f"the payload has more than {longest} bytes (max_record_bytes)")
    return record, body


def _decoded(body: bytes, content_type: str, record: Any) -> str:
    """The payload's text, in the encoding that its headers or HTML name, or else the most likely one."""
    charset = _CHARSET.search(content_type)
    encoding = charset and map_encoding_to_html5(charset[1], fallback_utf8=False)
    if not encoding and record.headers.get("WARC-Type") != "conversion":
        encoding = detect_encoding(body, from_html_meta=True)
    return bytes_to_str(body, encoding or "utf-8", errors="replace")

"""Reading WARC, the format of web archives (ISO 28500): responses, resources and conversions become documents.

A scanner finds where records begin and end, and what can be saved of damaged ones; fastwarc parses a single record.
Headers whose lines end with LF alone, as in ClueWeb09, are read like those with CRLF.
"""

from __future__ import annotations

import io
import re
import zlib
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
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, InputFile
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.optional import missing_library

_HEADER_BYTES = 2**16
_CHUNK_BYTES = 2**18
_RECORD_TYPE = re.compile(rb"^WARC-Type:[ \t]*(\w+)", re.IGNORECASE | re.MULTILINE)
_CONTENT_LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_END_OF_HEADER = re.compile(rb"\r?\n\r?\n")
_LINE_END = re.compile(rb"\r?\n")
_NEXT_RECORD = re.compile(rb"\nWARC/\d")
_OVERLAP = 6  # bytes: a match of _NEXT_RECORD may start with the last bytes of a chunk

_DOCUMENT_TYPES = (b"response", b"resource", b"conversion")
_TEXT_TYPE = re.compile(r"text/|application/([\w.-]+\+)?(xhtml|xml|json)\b|$", re.IGNORECASE)
_OK = 200
# How a payload is compressed that fastwarc cannot decode: zlib's `wbits` by Content-Encoding. Many servers send
# raw deflate, although RFC 9110 asks for the header of zlib.
_CONTENT_ENCODINGS = {"deflate": -15, "x-deflate": -15, "x-gzip": 31}
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)


def read_warc(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the records from byte `start` on. Records of other types, such as requests, are skipped."""
    begin = start or 0
    name = file_range.file.name
    parser = _archive_iterator(file_range.file)
    with ByteStream(file_range.file, begin) as stream:
        scanner = WarcScanner(stream, begin, options.max_record_bytes, _DOCUMENT_TYPES)
        while not scanner.at_end:
            builder = BatchBuilder(name, options)
            for record in _next_records(scanner):
                _add(record, name, builder, options, parser)
            if scanner.at_end and scanner.offset == 0 and not stream.damage:
                builder.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
            if not builder.is_empty:
                yield builder.batch(END_OF_FILE if scanner.at_end else scanner.offset)


def require_fastwarc(file: InputFile) -> None:
    """Raises DataError, naming the file, if fastwarc is not installed."""
    _archive_iterator(file)


def _archive_iterator(file: InputFile) -> Any:
    try:
        from fastwarc.warc import ArchiveIterator
    except ImportError:
        raise DataError(f"{file.path}: {missing_library('reading WARC', 'fastwarc')}") from None
    return ArchiveIterator


class WarcRecord(NamedTuple):
    """A record of `length` bytes at byte `offset`: its header, blank line and block, or why they cannot be read."""

    offset: int
    length: int
    data: bytes | InvalidRecord


class WarcScanner:
    """Cuts a stream into WARC records of the given types, and skips all others."""

    def __init__(self, stream: ByteStream, offset: int, max_bytes: int, types: Collection[bytes]) -> None:
        self._stream, self._max_bytes, self._types = stream, max_bytes, types
        self.offset = offset
        self.at_end = False

    def next_record(self) -> WarcRecord | None:
        """The next record, or None if it is of another type or if there is none."""
        data = self._stream.read(_HEADER_BYTES)
        blank = len(data) - len(data.lstrip(b"\r\n"))
        self.offset += blank
        if blank == len(data):
            self.at_end = len(data) < _HEADER_BYTES
            damage = self._stream.damage if self.at_end else None
            return WarcRecord(self.offset, 0, damage) if damage else None
        match = _END_OF_HEADER.search(data, blank)
        end = match.end() if match else blank
        header = data[blank:end] if data.startswith(b"WARC/", blank) else b""
        type_, length = _RECORD_TYPE.search(header), _CONTENT_LENGTH.search(header)
        if type_ is None or length is None:
            return self._resync(data[blank:], len(data) < _HEADER_BYTES)
        self._stream.unread(len(data) - end)
        return self._read_block(header, int(length[1]), type_[1].lower() in self._types)

    def _read_block(self, header: bytes, length: int, is_wanted: bool) -> WarcRecord | None:
        parts, missing = [header], length
        while missing > 0 and (part := self._stream.read(min(missing, _CHUNK_BYTES))):
            if is_wanted and length <= self._max_bytes:
                parts.append(part)
            missing -= len(part)
        offset, found = self.offset, len(header) + length - missing
        self.offset += found
        if missing:
            self.at_end = True
            cut = InvalidRecord("truncated", f"the file ends {missing} bytes before the end of this record")
            return WarcRecord(offset, found, self._stream.damage or cut)
        if not is_wanted:
            return None
        if length > self._max_bytes:
            error = f"the record has {length} bytes, expected at most {self._max_bytes} (max_record_bytes)"
            return WarcRecord(offset, found, InvalidRecord("too_long", error))
        return WarcRecord(offset, found, b"".join(parts))

    def _resync(self, data: bytes, is_last: bool) -> WarcRecord:
        """Skips bytes that are not a record, up to the next record.

        `data` are the bytes read last; `is_last` says that the file ends with them.
        """
        offset = self.offset
        while True:
            match = _NEXT_RECORD.search(data)
            self.at_end = match is None and is_last
            again = len(data) - match.start() - 1 if match else 0 if is_last else _OVERLAP
            self._stream.unread(again)
            self.offset += len(data) - again
            if match or is_last:
                break
            data = self._stream.read(_CHUNK_BYTES)
            is_last = len(data) < _CHUNK_BYTES
        damage = self._stream.damage if self.at_end else None
        lost = InvalidRecord(
            "damaged", "expected a WARC record with WARC-Type and Content-Length, found other bytes"
        )
        return WarcRecord(offset, self.offset - offset, damage or lost)


def _next_records(scanner: WarcScanner) -> Iterator[WarcRecord]:
    """The next records, about 4 MiB, at most 10,000."""
    stop = scanner.offset + BATCH_BYTES
    for _ in range(BATCH_RECORDS):
        record = scanner.next_record()
        if record:
            yield record
        if scanner.at_end or scanner.offset >= stop:
            return


def _add(found: WarcRecord, source: str, builder: BatchBuilder, options: ReadOptions, parser: Any) -> None:
    offset, length, data = found
    try:
        if isinstance(data, InvalidRecord):
            raise data
        record, body = _parse(_with_crlf(data), parser, options.max_record_bytes)
        if record.is_http and record.http_headers.status_code != _OK:
            builder.skip("http_status")
            return
        id_ = record.headers.get("WARC-Record-ID") or f"{source}:{offset}"
        content_type = (record.http_headers if record.is_http else record.headers).get("Content-Type") or ""
        if not _TEXT_TYPE.match(content_type):
            raise InvalidRecord("not_text", f"the record holds {content_type}, expected text")
        metadata = {
            "url": record.headers.get("WARC-Target-URI"),
            "date": record.headers.get("WARC-Date"),
            "content_type": content_type or None,
        }
        builder.add_text(offset, id_, _decode(body, content_type, record), metadata)
    except InvalidRecord as why:
        raw = data if isinstance(data, bytes) else None
        builder.reject(offset, why, offset=offset, length=length, raw=raw)


def _with_crlf(data: bytes) -> bytes:
    """A record in which the lines of both headers end with CRLF, as fastwarc expects."""
    end = _END_OF_HEADER.search(data)
    if end is None:
        return data
    header, block = data[: end.end()], data[end.end() :]
    http_end = _END_OF_HEADER.search(block) if block.startswith(b"HTTP/") else None
    http_header = block[: http_end.end()] if http_end else b""
    if b"\n" not in header.replace(b"\r\n", b"") + http_header.replace(b"\r\n", b""):
        return data
    block = _LINE_END.sub(b"\r\n", http_header) + block[len(http_header) :]
    header = _CONTENT_LENGTH.sub(b"Content-Length: %d" % len(block), header)
    return _LINE_END.sub(b"\r\n", header) + block


def _parse(data: bytes, parser: Any, max_bytes: int) -> tuple[Any, bytes]:
    """A record and its payload.

    The payload is decoded from its transfer and content encodings, or left as it is if it does not follow them.
    """
    for decoding in ("all", "transfer", "none"):
        try:
            record = next(iter(parser(io.BytesIO(data), auto_decode=decoding)), None)
            body = record.reader.read(max_bytes + 1) if record else b""
            break
        except OSError as error:
            problem = error
    else:
        raise InvalidRecord("damaged", f"is not a WARC record: {problem}")
    if record is None or (record.is_http and record.http_headers.status_code is None):
        raise InvalidRecord("damaged", "the record should hold an HTTP response, but holds other bytes")
    if decoding != "all" and record.is_http:
        body = _decompress(body, record.http_headers.get("Content-Encoding") or "", max_bytes)
    if len(body) > max_bytes:
        raise InvalidRecord("too_long", f"the payload has more than {max_bytes} bytes (max_record_bytes)")
    return record, body


def _decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompresses a payload that fastwarc could not; at most `max_bytes` + 1 bytes of it.

    Raises InvalidRecord if it begins like gzip data, but is damaged; a payload that is not compressed is returned.
    """
    is_gzip = body.startswith(b"\x1f\x8b")
    wbits = 31 if is_gzip else _CONTENT_ENCODINGS.get(encoding.strip().lower())
    if wbits is None:
        return body
    try:
        return zlib.decompressobj(wbits).decompress(body, max_bytes + 1)
    except zlib.error as error:
        if is_gzip:
            raise InvalidRecord("damaged", f"the payload is damaged gzip data: {error}") from None
        return body


def _decode(body: bytes, content_type: str, record: Any) -> str:
    """The text of a payload, in the encoding that its headers or its HTML name, or else in the most likely one."""
    charset = _CHARSET.search(content_type)
    encoding = charset and map_encoding_to_html5(charset[1], fallback_utf8=False)
    if not encoding and record.headers.get("WARC-Type") != "conversion":
        encoding = detect_encoding(body, from_html_meta=True)
    return bytes_to_str(body, encoding or "utf-8", errors="replace")

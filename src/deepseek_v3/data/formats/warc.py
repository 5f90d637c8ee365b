"""Reading WARC: the responses, resources and conversions of a web archive (ISO 28500)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END,
    Collector,
    ReadBatch,
    ReadOptions,
    Span,
)
from deepseek_v3.data.formats.extras import archive_iterator
from deepseek_v3.data.formats.quarantine import Rejected
from deepseek_v3.data.formats.streams import ByteStream
from deepseek_v3.data.formats.warc_frames import Frame, Frames

_KINDS = (b"response", b"resource", b"conversion")
_TEXT_TYPE = re.compile(r"text/|application/([\w.-]+\+)?(xhtml|xml|json)\b|$", re.IGNORECASE)
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)


def read_warc(span: Span, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the records from byte `start` on. Other kinds, such as requests, are no documents and left out."""
    begin = start or 0
    parser = archive_iterator(span.file.path)
    with ByteStream(span.file, begin) as stream:
        frames = Frames(stream, begin, options.max_record_bytes, _KINDS)
        while not frames.at_end:
            collector = Collector(span.file.name, options)
            for frame in _some(frames):
                _take(frame, span.file.name, collector, options, parser)
            if frames.at_end and frames.offset == 0 and not stream.damage:
                collector.reject(0, Rejected("empty", "holds no bytes"), offset=0, length=0, records=0)
            if not collector.is_empty:
                yield collector.batch(END if frames.at_end else frames.offset)


def _some(frames: Frames) -> Iterator[Frame]:
    """The next records, about 4 MiB, at most 10,000."""
    stop = frames.offset + BATCH_BYTES
    for _ in range(BATCH_RECORDS):
        frame = frames.next_frame()
        if frame:
            yield frame
        if frames.at_end or frames.offset >= stop:
            return


def _take(frame: Frame, source: str, collector: Collector, options: ReadOptions, parser: Any) -> None:
    offset, length, data = frame
    try:
        if isinstance(data, Rejected):
            raise data
        record, body = _parsed(data, parser, options.max_record_bytes)
        id_ = record.headers.get("WARC-Record-ID") or f"{source}:{offset}"
        content_type = (record.http_headers if record.is_http else record.headers).get("Content-Type") or ""
        if not _TEXT_TYPE.match(content_type):
            raise Rejected("not_text", f"the record holds {content_type}, expected text")
        metadata = {
            "url": record.headers.get("WARC-Target-URI"),
            "date": record.headers.get("WARC-Date"),
            "content_type": content_type or None,
        }
        collector.add_text(offset, id_, _decoded(body, content_type, record), metadata)
    except Rejected as why:
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
        raise Rejected("damaged", f"is no WARC record: {error}") from None
    if record is None or (record.is_http and record.http_headers.status_code is None):
        raise Rejected("damaged", "the record holds no HTTP response, though it says so")
    if len(body) > longest:
        raise Rejected("too_long", f"the payload has more than {longest} bytes (max_record_bytes)")
    return record, body


def _decoded(body: bytes, content_type: str, record: Any) -> str:
    """The payload's text, in the encoding that its headers or HTML name, or else the most likely one."""
    charset = _CHARSET.search(content_type)
    encoding = charset and map_encoding_to_html5(charset[1], fallback_utf8=False)
    if not encoding and record.headers.get("WARC-Type") != "conversion":
        encoding = detect_encoding(body, from_html_meta=True)
    return bytes_to_str(body, encoding or "utf-8", errors="replace")

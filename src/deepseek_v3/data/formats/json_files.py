"""Reading JSON files: an array of objects, objects one after the other, or in fact JSON lines."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END,
    Collector,
    ReadBatch,
    ReadOptions,
    Span,
)
from deepseek_v3.data.formats.json_lines import read_json_lines
from deepseek_v3.data.formats.json_scanner import Value, Values
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, json_value
from deepseek_v3.data.formats.quarantine import Rejected
from deepseek_v3.data.formats.streams import ByteStream

_HEAD_BYTES = 2**20


def read_json(span: Span, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
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
            collector = Collector(span.file.name, options)
            values.collect(collector)
            if not collector.is_empty:
                yield collector.batch(END if values.at_end else values.offset)


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

    def collect(self, collector: Collector) -> None:
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

    def _take(self, value: Value, collector: Collector) -> None:
        offset, length, data, is_whole = value
        try:
            if not is_whole:
                self.at_end = True
                raise self._stream.damage or Rejected("truncated", "the file ends inside this value")
            if data is None:
                raise Rejected(
                    "too_long", f"has {length} bytes, expected at most {self._longest} (max_record_bytes)"
                )
            collector.add(offset, json_value(data, offset))
        except Rejected as why:
            collector.reject(offset, why, offset=offset, length=length, raw=data)

    def _check_end(self, is_closed: bool, collector: Collector) -> None:
        why = None
        if is_closed:
            self.step()
            if self.skip():
                why = Rejected("not_json", "goes on behind the end of its array; expected one array")
        elif self.in_array:
            why = Rejected("truncated", "the file ends before its array is closed")
        if why := self._stream.damage or why:
            collector.reject(self.offset, why, offset=self.offset)

"""Reading JSON lines: one object per line."""

from __future__ import annotations

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
from deepseek_v3.data.formats.inputs import InputFile
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, parse_json
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, open_raw

_PIECE_BYTES = 2**16


def split_json_lines(file: InputFile, range_bytes: int) -> list[FileRange]:
    """Spans of `range_bytes` of a local, uncompressed file; otherwise, or where it cannot be read, one for all."""
    if file.is_remote or file.format.compression:
        return [FileRange(file)]
    try:
        open_raw(file).close()
    except OSError:
        return [FileRange(file)]
    starts = [*range(0, file.size, range_bytes)] or [0]
    return [FileRange(file, one, other) for one, other in zip(starts, [*starts[1:], None], strict=True)]


def read_json_lines(span: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the lines that start in a span, or those from the line at `start` on."""
    # The byte before the span tells whether a line starts with it.
    begin = max(span.start - 1, 0) if start is None else start
    with ByteStream(span.file, begin) as stream:
        lines = _Lines(stream, begin, options.max_record_bytes)
        if begin < span.start:
            lines.skip_line()
        while span.stop is None or lines.offset < span.stop:
            block = lines.block(span.stop)
            collector = BatchBuilder(span.file.name, options)
            unfinished = block.lines.pop() if stream.damage and block.unfinished else None
            offset = _collect(block.lines, block.offset, collector, options.max_record_bytes)
            if block.too_long:
                _reject_long(collector, offset, block.too_long, options.max_record_bytes)
            if block.at_end:
                _end(collector, lines.offset, unfinished, stream.damage)
            done = block.at_end or (span.stop is not None and lines.offset >= span.stop)
            if not collector.is_empty:
                yield collector.batch(END_OF_FILE if done else lines.offset)
            if done:
                return


class _Block(NamedTuple):
    """Lines without their newlines, the first at byte `offset`, and the length of a last one that is too long.

    `at_end` says that the file ends here, `unfinished` that its last line has no newline.
    """

    offset: int
    lines: list[bytes]
    too_long: int
    at_end: bool
    unfinished: bool


class _Lines:
    """Cuts a stream into blocks of lines: those that start within 4 MiB, at most 10,000."""

    def __init__(self, stream: ByteStream, offset: int, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self.offset = offset

    def skip_line(self) -> None:
        """Goes on to the next start of a line."""
        _, length, has_newline = self._completed(b"")
        self.offset += length + has_newline

    def block(self, stop: int | None) -> _Block:
        """The next lines, those that start before `stop`."""
        offset = self.offset
        size = BATCH_BYTES if stop is None else min(BATCH_BYTES, stop - offset)
        data = self._stream.read(size)
        lines = data.split(b"\n", BATCH_RECORDS)
        begun = lines.pop()
        if len(lines) == BATCH_RECORDS:
            self._stream.unread(len(begun))
            self.offset += len(data) - len(begun)
            return _Block(offset, lines, 0, False, False)
        self.offset += len(data)
        if not begun:
            return _Block(offset, lines, 0, len(data) < size, False)
        line, length, has_newline = self._completed(begun)
        self.offset += length - len(begun) + has_newline
        if line is None:
            return _Block(offset, lines, length, not has_newline, False)
        return _Block(offset, [*lines, line], 0, not has_newline, not has_newline)

    def _completed(self, begun: bytes) -> tuple[bytes | None, int, bool]:
        """The line that was begun, or None if it is too long, its length, and whether it ends with a newline."""
        parts, length = [begun], len(begun)
        while True:
            data = self._stream.read(_PIECE_BYTES)
            rest, newline, following = data.partition(b"\n")
            length += len(rest)
            if length <= self._longest:
                parts.append(rest)
            else:
                parts.clear()
            if newline or len(data) < _PIECE_BYTES:
                self._stream.unread(len(following))
                return b"".join(parts) if length <= self._longest else None, length, bool(newline)


def _collect(lines: list[bytes], offset: int, collector: BatchBuilder, longest: int) -> int:
    """Takes the lines that are documents and rejects the others; returns the offset behind them."""
    for line in lines:
        try:
            if len(line) > longest:
                _reject_long(collector, offset, len(line), longest)
            else:
                collector.add(offset, orjson.loads(line))
        except (orjson.JSONDecodeError, InvalidRecord):
            _reconsider(line, offset, collector)
        offset += len(line) + 1
    return offset


def _reconsider(line: bytes, offset: int, collector: BatchBuilder) -> None:
    """Takes a line that is more than plain JSON in UTF-8, skips one that is blank, and rejects any other."""
    content = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
    if not content.strip():
        return
    try:
        collector.add(offset, parse_json(content, offset + len(line) - len(content)))
    except InvalidRecord as why:
        collector.reject(offset, why, offset=offset, length=len(line), raw=line)


def _reject_long(collector: BatchBuilder, offset: int, length: int, longest: int) -> None:
    why = InvalidRecord("too_long", f"the line has {length} bytes, expected at most {longest} (max_record_bytes)")
    collector.reject(offset, why, offset=offset, length=length)


def _end(collector: BatchBuilder, end: int, unfinished: bytes | None, damage: InvalidRecord | None) -> None:
    """Notes how the file ends, if it does not end well."""
    if damage is None:
        if end == 0:
            collector.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
    elif unfinished is None:
        collector.reject(end, damage, offset=end)
    else:
        offset = end - len(unfinished)
        try:
            collector.add(offset, parse_json(unfinished, offset))
            collector.reject(end, damage, offset=end)
        except InvalidRecord:
            collector.reject(offset, damage, offset=offset, length=len(unfinished), raw=unfinished)

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
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, InputFile, open_raw

_CHUNK_BYTES = 2**16


def split_json_lines(file: InputFile, range_bytes: int) -> list[FileRange]:
    """Ranges of `range_bytes`; a single one if the file is remote, compressed or cannot be opened."""
    if file.is_remote or file.compression:
        return [FileRange(file)]
    try:
        open_raw(file).close()
    except OSError:
        return [FileRange(file)]
    starts = [*range(0, file.size, range_bytes)] or [0]
    return [FileRange(file, one, other) for one, other in zip(starts, [*starts[1:], None], strict=True)]


def read_json_lines(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:
    """Reads the lines that start in a range, or from the line at byte `start` on."""
    # The byte before the range shows whether a line starts at its first byte.
    begin = max(file_range.start - 1, 0) if start is None else start
    stop, max_bytes = file_range.stop, options.max_record_bytes
    with ByteStream(file_range.file, begin) as stream:
        lines = _LineReader(stream, begin, max_bytes)
        if begin < file_range.start:
            lines.skip_line()
        while stop is None or lines.offset < stop:
            block = lines.next_block(stop)
            builder = BatchBuilder(file_range.file.name, options)
            unfinished = block.lines.pop() if stream.damage and block.unfinished else None
            offset = _add_lines(block.lines, block.offset, builder, max_bytes)
            if block.too_long:
                _reject_long(builder, offset, block.too_long, max_bytes)
            if block.at_end:
                _add_end(builder, lines.offset, unfinished, stream.damage)
            done = block.at_end or (stop is not None and lines.offset >= stop)
            if not builder.is_empty:
                yield builder.batch(END_OF_FILE if done else lines.offset)
            if done:
                return


class _Block(NamedTuple):
    """Lines without their newlines, and the byte `offset` of the first.

    `too_long` is the length of a further line that is longer than allowed, else 0. `at_end` says that the file ends
    here, `unfinished` that the last line has no newline.
    """

    offset: int
    lines: list[bytes]
    too_long: int
    at_end: bool
    unfinished: bool


class _LineReader:
    """Reads a stream in blocks of lines: those that start within 4 MiB, at most 10,000."""

    def __init__(self, stream: ByteStream, offset: int, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self.offset = offset

    def skip_line(self) -> None:
        """Moves to the next start of a line."""
        _, length, has_newline = self._completed(b"")
        self.offset += length + has_newline

    def next_block(self, stop: int | None) -> _Block:
        """The next lines that start before byte `stop`."""
        size = BATCH_BYTES if stop is None else min(BATCH_BYTES, stop - self.offset)
        data = self._stream.read(size)
        is_last = len(data) < size
        # Blank lines at the beginning are skipped at once, because millions of them are no millions of records.
        blank = data.rfind(b"\n", 0, len(data) - len(data.lstrip())) + 1
        data = data[blank:]
        offset = self.offset = self.offset + blank
        lines = data.split(b"\n", BATCH_RECORDS)
        begun = lines.pop()
        if len(lines) == BATCH_RECORDS:
            self._stream.unread(len(begun))
            self.offset += len(data) - len(begun)
            return _Block(offset, lines, 0, False, False)
        self.offset += len(data)
        if not begun:
            return _Block(offset, lines, 0, is_last, False)
        line, length, has_newline = self._completed(begun)
        self.offset += length - len(begun) + has_newline
        if line is None:
            return _Block(offset, lines, length, not has_newline, False)
        return _Block(offset, [*lines, line], 0, not has_newline, not has_newline)

    def _completed(self, begun: bytes) -> tuple[bytes | None, int, bool]:
        """Reads the rest of a line. Returns it (None if too long), its length, and whether it has a newline."""
        parts, length = [begun], len(begun)
        while True:
            data = self._stream.read(_CHUNK_BYTES)
            rest, newline, following = data.partition(b"\n")
            length += len(rest)
            if length <= self._max_bytes:
                parts.append(rest)
            else:
                parts.clear()
            if newline or len(data) < _CHUNK_BYTES:
                self._stream.unread(len(following))
                return b"".join(parts) if length <= self._max_bytes else None, length, bool(newline)


def _add_lines(lines: list[bytes], offset: int, builder: BatchBuilder, max_bytes: int) -> int:
    """Adds the lines that are documents and rejects the others; returns the offset after the last line."""
    for line in lines:
        try:
            if len(line) > max_bytes:
                _reject_long(builder, offset, len(line), max_bytes)
            else:
                builder.add(offset, orjson.loads(line))
        except InvalidRecord as why:
            builder.reject(offset, why, offset=offset, length=len(line), raw=line)
        except orjson.JSONDecodeError:
            _add_unusual(line, offset, builder)
        offset += len(line) + 1
    return offset


def _add_unusual(line: bytes, offset: int, builder: BatchBuilder) -> None:
    """Adds a line that starts with a byte order mark, skips a blank line, and rejects any other."""
    content = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
    if not content.strip():
        return
    try:
        builder.add_json(offset, content, offset + len(line) - len(content))
    except InvalidRecord as why:
        builder.reject(offset, why, offset=offset, length=len(line), raw=line)


def _reject_long(builder: BatchBuilder, offset: int, length: int, max_bytes: int) -> None:
    why = InvalidRecord("too_long", f"the line has {length} bytes, expected at most {max_bytes} (max_record_bytes)")
    builder.reject(offset, why, offset=offset, length=length)


def _add_end(builder: BatchBuilder, end: int, unfinished: bytes | None, damage: InvalidRecord | None) -> None:
    """Rejects the end of an empty or damaged file; an unfinished last line before the damage may be a document."""
    if damage is None:
        if end == 0:
            builder.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
    elif unfinished is None:
        builder.reject(end, damage, offset=end)
    else:
        offset = end - len(unfinished)
        try:
            builder.add_json(offset, unfinished, offset)
            builder.reject(end, damage, offset=end)
        except InvalidRecord:
            builder.reject(offset, damage, offset=offset, length=len(unfinished), raw=unfinished)

"""Reading files that are one document each: plain text, and other formats by a function that parses their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from deepseek_v3.data.formats.batches import END_OF_FILE, BatchBuilder, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, decode_utf8
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_CHUNK_BYTES = 2**18


class ParsedFile(NamedTuple):
    """The text of a file that is one document, its metadata, and the codes of what was repaired in it."""

    text: str
    metadata: dict[str, Any]
    repairs: tuple[str, ...] = ()


# Parses the bytes of a file. Raises InvalidRecord if they are not what the format says.
FileParser: TypeAlias = Callable[[bytes], ParsedFile]


def parse_text(data: bytes) -> ParsedFile:
    """Decodes plain text in UTF-8. Raises InvalidRecord if it is not UTF-8."""
    content = data.removeprefix(BYTE_ORDER_MARK)
    return ParsedFile(decode_utf8(content, len(data) - len(content)), {})


def read_file(
    parse: FileParser,
    file_range: FileRange,
    options: ReadOptions,
    start: int | None,  # noqa: ARG001
) -> Iterator[ReadBatch]:
    """Reads a file as one document, whose id is the file's name, in one batch; ignores `start`."""
    builder = BatchBuilder(file_range.file.name, options)
    add_file(parse, file_range, builder, options)
    yield builder.batch(END_OF_FILE)


def add_file(parse: FileParser, file_range: FileRange, builder: BatchBuilder, options: ReadOptions) -> None:
    """Adds a file as one document, whose id is the file's name, to a batch, which may hold other files."""
    data, length, damage = _read(file_range, options.max_record_bytes)
    try:
        if damage:
            raise damage
        builder.add_text(0, file_range.file.name, *parse(data))
    except InvalidRecord as why:
        builder.reject(0, why, offset=0, length=length, raw=data or None)


def _read(file_range: FileRange, max_bytes: int) -> tuple[bytes, int, InvalidRecord | None]:
    """The bytes of the file, their number, and any damage; no bytes if there are more than `max_bytes`."""
    parts, length = [], 0
    with ByteStream(file_range.file) as stream:
        while part := stream.read(_CHUNK_BYTES):
            length += len(part)
            if length <= max_bytes:
                parts.append(part)
            else:
                parts.clear()
        damage = stream.damage
    if not damage and not length:
        damage = InvalidRecord("empty", "holds no bytes")
    if not damage and length > max_bytes:
        damage = InvalidRecord(
            "too_long", f"the file has {length} bytes, expected at most {max_bytes} (max_record_bytes)"
        )
    return b"".join(parts), length, damage

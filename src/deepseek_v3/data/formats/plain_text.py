"""Reading plain text files: each file is one document."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_v3.data.formats.batches import END_OF_FILE, BatchBuilder, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, decode_utf8
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_CHUNK_BYTES = 2**18


def read_text(file_range: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:  # noqa: ARG001
    """Reads a file as one document, whose id is the file's name, in one batch; ignores `start`."""
    builder = BatchBuilder(file_range.file.name, options)
    add_text_file(file_range, builder, options)
    yield builder.batch(END_OF_FILE)


def add_text_file(file_range: FileRange, builder: BatchBuilder, options: ReadOptions) -> None:
    """Adds a file as one document, whose id is the file's name, to a batch, which may hold other files."""
    name = file_range.file.name
    data, length, damage = _read(file_range, options.max_record_bytes)
    try:
        if damage:
            raise damage
        content = data.removeprefix(BYTE_ORDER_MARK)
        builder.add_text(0, name, decode_utf8(content, length - len(content)), {})
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

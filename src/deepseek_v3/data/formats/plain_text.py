"""Reading plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_v3.data.formats.batches import END_OF_FILE, BatchBuilder, FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, decode_utf8
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream

_PIECE_BYTES = 2**18


def read_text(span: FileRange, options: ReadOptions, start: int | None) -> Iterator[ReadBatch]:  # noqa: ARG001
    """Reads a file, whose name is its id. Nothing is left behind its one batch, so there is nowhere to start."""
    collector = BatchBuilder(span.file.name, options)
    data, length, damage = _read(span, options.max_record_bytes)
    try:
        if damage:
            raise damage
        content = data.removeprefix(BYTE_ORDER_MARK)
        collector.add_text(0, span.file.name, decode_utf8(content, length - len(content)), {})
    except InvalidRecord as why:
        collector.reject(0, why, offset=0, length=length, raw=data or None)
    yield collector.batch(END_OF_FILE)


def _read(span: FileRange, longest: int) -> tuple[bytes, int, InvalidRecord | None]:
    """The file's bytes unless they are too many, their number, and what is wrong with it."""
    parts, length = [], 0
    with ByteStream(span.file) as stream:
        while part := stream.read(_PIECE_BYTES):
            length += len(part)
            if length <= longest:
                parts.append(part)
            else:
                parts.clear()
        damage = stream.damage
    if not damage and not length:
        damage = InvalidRecord("empty", "holds no bytes")
    if not damage and length > longest:
        damage = InvalidRecord(
            "too_long", f"the file has {length} bytes, expected at most {longest} (max_record_bytes)"
        )
    return b"".join(parts), length, damage

"""Reading tar archives: each text file in them is a document. Nothing is extracted to the disk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from deepseek_v3.data.documents import is_hidden
from deepseek_v3.data.formats.batches import (
    BATCH_BYTES,
    BATCH_RECORDS,
    END_OF_FILE,
    BatchBuilder,
    FileRange,
    ReadBatch,
    ReadOptions,
)
from deepseek_v3.data.formats.plain_text import FileParser
from deepseek_v3.data.formats.quarantine import InvalidRecord
from deepseek_v3.data.formats.streams import ByteStream, Decompressor, split_suffix
from deepseek_v3.data.formats.tar_members import TarMember, TarScanner

# The parser of a file that is one document, by its name; None for other files.
ParserLookup = Callable[[str], "FileParser | None"]


def read_tar(
    parser_of: ParserLookup, file_range: FileRange, options: ReadOptions, start: int | None
) -> Iterator[ReadBatch]:
    """Reads the members from byte `start` on. The id of a document is the archive's name and the member's path."""
    file, begin = file_range.file, start or 0
    with ByteStream(file, begin) as stream:
        scanner = TarScanner(stream, begin)
        while not scanner.at_end:
            builder = BatchBuilder(file.name, options)
            stop = scanner.offset + BATCH_BYTES
            for _ in range(BATCH_RECORDS):
                _add_next(scanner, builder, parser_of, options.max_record_bytes)
                if scanner.at_end or scanner.offset >= stop:
                    break
            if scanner.at_end and scanner.offset == 0 and not stream.damage:
                builder.reject(0, InvalidRecord("empty", "holds no bytes"), offset=0, length=0, records=0)
            if not builder.is_empty:
                yield builder.batch(END_OF_FILE if scanner.at_end else scanner.offset)


def _add_next(scanner: TarScanner, builder: BatchBuilder, parser_of: ParserLookup, max_bytes: int) -> None:
    """Adds the next member if it is a document, counts it if it is none, and rejects what is damaged."""
    begin, data, path = scanner.offset, b"", None
    try:
        member = scanner.next_member()
        if member is None or member.is_folder:
            return
        if not member.is_file:
            builder.skip("member_type")
            return
        begin = member.offset
        path = _inner_path(member.path)
        parse = parser_of(path or "")
        if path is None or parse is None or is_hidden(path) or member.size > max_bytes:
            scanner.skip(member.size)
            _leave_out(member, path, parse, builder, max_bytes)
            return
        data = scanner.read(member.size)
        parsed = parse(_content(data, path, max_bytes))
        metadata = {"path": path, **parsed.metadata}
        builder.add_text(begin, f"{builder.source}/{path}", parsed.text, metadata, parsed.repairs)
    except InvalidRecord as why:
        named = InvalidRecord(why.reason, f"{path}: {why.error}") if path else why
        builder.reject(begin, named, offset=begin, length=scanner.offset - begin, raw=data or None)


def _leave_out(
    member: TarMember, path: str | None, parse: FileParser | None, builder: BatchBuilder, max_bytes: int
) -> None:
    """Counts a file that is no document; hidden ones are not counted. Raises InvalidRecord if it should be one."""
    if path is None:
        shown = member.path.encode(errors="replace").decode()
        raise InvalidRecord(
            "path", f"the member {shown!r} has a path that is not UTF-8, or leads out of the archive"
        )
    if is_hidden(path):
        return
    if parse is None:
        builder.skip("member_format")
        return
    raise InvalidRecord("too_long", f"has {member.size} bytes, expected at most {max_bytes} (max_record_bytes)")


def _inner_path(path: str) -> str | None:
    """The path of a member without "./"; None if it is not UTF-8, is absolute, or has a part that is ".."."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    is_text = path.isprintable() and path.encode(errors="replace").decode() == path
    return "/".join(parts) if parts and is_text and ".." not in parts and not path.startswith("/") else None


def _content(data: bytes, path: str, max_bytes: int) -> bytes:
    """The bytes of a member, decompressed if its name says so. Raises InvalidRecord for none, or too many."""
    compression = split_suffix(path)[1]
    if compression is not None:
        packed, unpacked = Decompressor(io.BytesIO(data), compression), io.BytesIO()
        while unpacked.tell() <= max_bytes and (chunk := packed.next_chunk()):
            unpacked.write(chunk)
        data = unpacked.getvalue()
    if not data:
        raise InvalidRecord("empty", "holds no bytes")
    if len(data) > max_bytes:
        raise InvalidRecord("too_long", f"has more than {max_bytes} bytes (max_record_bytes)")
    return data

"""Reading the files of an input: in ranges and batches that keep invalid records aside, or document by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import orjson
import pyarrow as pa

from deepseek_v3.data.documents import Document
from deepseek_v3.data.formats.batches import END_OF_FILE, FileRange, ReadBatch, ReadOptions, take_field
from deepseek_v3.data.formats.file_types import known_format
from deepseek_v3.data.formats.inputs import check_unchanged, find_inputs
from deepseek_v3.data.formats.quarantine import REPAIRS, SKIPPED
from deepseek_v3.data.formats.streams import ByteStream, InputFile
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger

# The usual names of the field with the text, in the order in which they are tried if none is configured.
TEXT_FIELDS = (
    *("text", "content", "raw_content", "contents", "page_content", "body", "document", "article", "passage"),
    *("markdown", "code"),
)

_HEAD_BYTES = 2**16  # of JSON lines; of other formats, the first batch is the beginning of a file
_NAMES_SHOWN = 3

_log = get_logger("Reading")


def split_file(file: InputFile, range_bytes: int) -> list[FileRange]:
    """Splits a file into ranges of about `range_bytes`, or into a single one if its format cannot be split.

    Local, uncompressed JSON lines are split by bytes, and a line belongs to the range in which it starts. Parquet
    files are split at row groups, Arrow files at record batches. All ranges in order give the records of the file.
    """
    return known_format(file).split(file, range_bytes)


def read_range(file_range: FileRange, options: ReadOptions, start: int | None = None) -> Iterator[ReadBatch]:
    """Reads a range from its beginning, or from `start`, the position that came with one of its batches.

    A batch holds about 4 MiB or 10,000 records. Batches depend on the content of the file alone, so reading from a
    position gives the same batches that would have followed it. Invalid records are quarantined; no content of a
    file raises an error. If `options` names no field for the text, it is the first of `TEXT_FIELDS` that holds text
    at the beginning of the file. Raises DataError if a store fails, or if a library that the format needs is
    missing.
    """
    if start == END_OF_FILE:
        return iter(())
    format_ = known_format(file_range.file)
    if options.text_field is None and format_.has_fields:
        options = replace(options, text_field=find_text_field(file_range.file, options))
    return format_.read(file_range, options, start)


def read_head(file: InputFile, options: ReadOptions) -> ReadBatch | None:
    """The first records of a file, or None if it has none."""
    stop = _HEAD_BYTES if known_format(file).place == "line" else None
    return next(read_range(FileRange(file, 0, stop), options), None)


@lru_cache(maxsize=2**10)
def find_text_field(file: InputFile, options: ReadOptions) -> str | None:
    """The first of the usual names under which the first records of a file hold a text; None if there is none."""
    for name in TEXT_FIELDS:
        head = read_head(file, replace(options, text_field=name))
        if head is not None and head.records.num_rows:
            return name
    return None


def read_documents(
    source: str | Path,
    text_field: str = "text",
    *,
    warn: bool = True,
    max_record_bytes: int = ReadOptions.max_record_bytes,
) -> Iterator[Document]:
    """Yields the documents of a file, a folder, a pattern or an address, without those that are only white space.

    Reads the files that `find_inputs` finds, in the order of their names; the text of a record is in `text_field`,
    and has at most `max_record_bytes` bytes.
    With `warn`, logs the names of files that are skipped because their format is unknown.

    Raises DataError at the first invalid record, naming the file and the line, byte or row, and at the end if there
    was no text at all.
    """
    for _, records in _valid_records(source, ReadOptions(text_field, max_record_bytes=max_record_bytes), warn):
        for id_, text in zip(records["id"].to_pylist(), records["text"].to_pylist(), strict=True):
            yield Document(id_, text)


def read_labelled_documents(
    source: str | Path,
    label_field: str,
    text_field: str = "text",
    max_record_bytes: int = ReadOptions.max_record_bytes,
) -> Iterator[tuple[str, Document]]:
    """Yields what `read_documents` does, each with its label: the string or integer in `label_field`.

    `a.b` is field b of object a. Raises DataError also for a record without such a label, and names its place.
    """
    options = ReadOptions(text_field, max_record_bytes=max_record_bytes)
    for file, records in _valid_records(source, options, warn=True):
        for record in records.to_pylist():
            fields = orjson.loads(record["metadata"] or "{}")
            label = take_field(fields, label_field)
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                raise DataError(
                    f"{_where(file, record['place'])}: has no string or integer in field {label_field!r}, which "
                    "should name its source; name another field"
                )
            yield str(label), Document(record["id"], record["text"])


def _valid_records(
    source: str | Path, options: ReadOptions, warn: bool
) -> Iterator[tuple[InputFile, pa.RecordBatch]]:
    """Batches of the records whose text is more than white space; see `read_documents`."""
    files, ignored = find_inputs(source)
    if ignored and warn:
        names = ", ".join(f"{one.name} ({one.reason})" for one in ignored[:_NAMES_SHOWN])
        _log.warning(f"{source}: {len(ignored)} files are left out: {names}")
    found = False
    repaired: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for file in files:
        for batch in read_range(FileRange(file), options):
            repaired.update(batch.repaired)
            skipped.update(batch.skipped)
            _require_valid(batch.quarantined, file)
            records = batch.records
            rows = [row for row, text in enumerate(records["text"].to_pylist()) if text and not text.isspace()]
            if rows:
                found = True
                yield file, records if len(rows) == records.num_rows else records.take(rows)
        check_unchanged(file)
    for name, count in repaired.items() if warn else ():
        _log.warning("%s: %s records were repaired (%s): %s", source, f"{count:,}", name, REPAIRS[name])
    for name, count in skipped.items() if warn else ():
        _log.warning("%s: %s are no documents (%s): %s", source, f"{count:,}", name, SKIPPED[name])
    if not found:
        raise DataError(
            f"{source}: holds no text; expected text files, or records with text in {options.text_field!r}"
        )


def _require_valid(quarantined: pa.RecordBatch, file: InputFile) -> None:
    """Raises DataError for the first entry, except for one that says that the file is empty."""
    for entry in quarantined.to_pylist():
        if entry["reason"] != "empty":
            where = file.path if entry["reason"] == "unreadable" else _where(file, entry["place"])
            raise DataError(f"{where}: {entry['error']}")


def _where(file: InputFile, place: int) -> str:
    """The file and the place in it, for messages."""
    kind = known_format(file).place
    if kind == "file":
        return file.path
    if kind == "line":
        return f"{file.path}:{_line(file, place)}"
    return f"{file.path}: {kind} {place}"


def _line(file: InputFile, offset: int) -> int:
    """The number, counted from 1, of the line that starts at byte `offset`."""
    line = 1
    with ByteStream(file) as stream:
        while offset > 0 and (data := stream.read(min(offset, 2**20))):
            line += data.count(b"\n")
            offset -= len(data)
    return line

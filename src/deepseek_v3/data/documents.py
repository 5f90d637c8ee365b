"""Documents, as objects and as Arrow record batches, and conversions between the two."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import pyarrow as pa

from deepseek_v3.utils.errors import DataError


@dataclass(frozen=True)
class Document:
    """A text with its id: the id in the source, or else the file and the place in it."""

    id: str
    text: str


def walk_files(root: Path, skipped: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """Yields every file below the folder `root`, sorted by path, or `root` itself if it is a file.

    Skips hidden files and folders, and those named in `skipped`. Enters each folder once, so links cannot loop.
    Broken links and pipes are yielded too.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            status = path.stat()
            if (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                children = sorted(path.iterdir(), key=lambda child: child.name, reverse=True)
                waiting += [c for c in children if not c.name.startswith(".") and c.name not in skipped]
        else:
            yield path


def is_hidden(name: str) -> bool:
    """Whether the path of a file leads through a hidden folder or __pycache__, or the file itself is hidden."""
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def check_unicode(text: str, where: str) -> None:
    """Raises DataError if `text` holds a lone surrogate, which UTF-8, and so a tokenizer, cannot express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which no UTF-8 can express; remove it, or write both halves of the pair"
        ) from None


# `source` is the name of the file, its path below the input. `place` is the byte offset of the line or record in
# the decompressed file, or the row of a Parquet or Arrow file, counted from 1. `metadata` is a JSON object with the
# other fields of the input, or null. Stages may append columns.
RECORDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("metadata", pa.string()),
    ]
)
_BATCH_CHARACTERS = 2**23

AnyDocument: TypeAlias = str | Document | Mapping[str, Any]
Documents: TypeAlias = Iterable[AnyDocument] | Iterable[pa.RecordBatch] | pa.Table


def record_batch(
    ids: Sequence[str],
    texts: Sequence[str],
    sources: Sequence[str],
    places: Sequence[int],
    metadata: Sequence[str | None],
) -> pa.RecordBatch:
    """A batch of `RECORDS` from columns of equal length."""
    columns = (ids, texts, sources, places, metadata)
    arrays = [pa.array(column, field.type) for field, column in zip(RECORDS, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORDS)


def with_texts(batch: pa.RecordBatch, texts: Sequence[str] | pa.Array) -> pa.RecordBatch:
    """The batch with its texts replaced."""
    return with_column(batch, RECORDS.field("text"), texts)


def with_column(batch: pa.RecordBatch, field: pa.Field, values: Sequence[Any] | pa.Array) -> pa.RecordBatch:
    """The batch with a column appended, or replaced if it has one of that name."""
    column = values if isinstance(values, pa.Array) else pa.array(values, field.type)
    index = batch.schema.get_field_index(field.name)
    return batch.append_column(field, column) if index < 0 else batch.set_column(index, field, column)


@dataclass(frozen=True)
class ConvertedBatch:
    """A batch of `RECORDS`, and the caller's objects that it was made from, or None for Arrow data.

    `ids` are the caller's ids; the id of an object without one is its position among all documents, from 0.
    """

    records: pa.RecordBatch
    originals: list[AnyDocument] | None
    ids: list[str | int]


def convert_documents(documents: Documents) -> Iterator[ConvertedBatch]:
    """Converts documents to batches of `RECORDS`.

    `documents` is an Arrow table, or a list or an iterator of Arrow batches, texts, `Document`s, or mappings with a
    `text` and optionally an `id`. Raises DataError for anything else, for a text that is missing or not a string,
    and for a text that holds a lone surrogate; for objects, the message names the position.
    """
    if isinstance(documents, (pa.Table, pa.RecordBatch)):
        table = pa.Table.from_batches([documents]) if isinstance(documents, pa.RecordBatch) else documents
        yield from _from_arrow(table.to_batches())
        return
    if isinstance(documents, (str, Mapping, Document)):
        raise DataError(
            f"documents: found one {type(documents).__name__}, expected a list or an iterator of documents"
        )
    items = iter(documents)
    first = next(items, None)
    if first is None:
        return
    if isinstance(first, pa.RecordBatch):
        yield from _from_arrow(chain([first], items))
    else:
        yield from _from_objects(chain([first], items))


def convert_back(
    given: ConvertedBatch, kept: pa.RecordBatch, rows: Sequence[int]
) -> list[AnyDocument] | pa.RecordBatch:
    """Converts the kept records, which had these `rows` in the batch, back to the type of the caller's documents.

    A mapping gets the new text and the columns that stages appended; a text and a `Document` get the new text.
    """
    if given.originals is None:
        return kept
    added = [name for name in kept.schema.names if name not in RECORDS.names]
    columns = {name: kept.column(name).to_pylist() for name in ("text", *added)}
    return [
        _updated(given.originals[row], {name: column[index] for name, column in columns.items()})
        for index, row in enumerate(rows)
    ]


def _updated(original: AnyDocument, fields: dict[str, Any]) -> AnyDocument:
    if isinstance(original, str):
        return str(fields["text"])
    if isinstance(original, Document):
        return original if original.text == fields["text"] else replace(original, text=fields["text"])
    return {**original, **fields}


def _from_arrow(batches: Iterable[pa.RecordBatch]) -> Iterator[ConvertedBatch]:
    position = 0
    for batch in batches:
        names = batch.schema.names
        if "text" not in names:
            raise DataError(f"Arrow batch: has no column 'text', only {names}; rename the one that holds the text")
        texts = batch.column("text").cast(pa.string())
        if texts.null_count:
            raise DataError(f"Arrow batch: {texts.null_count} texts are null, expected strings; drop those rows")
        positions = list(range(position, position + batch.num_rows))
        ids: list[str | int] = (
            [*batch.column("id").cast(pa.string()).to_pylist()] if "id" in names else [*positions]
        )
        filled = {
            "id": pa.array([str(id_) for id_ in ids], pa.string()),
            "text": texts,
            "source": pa.array([""] * len(ids), pa.string()),
            "place": pa.array([place + 1 for place in positions], pa.int64()),
            "metadata": pa.nulls(len(ids), pa.string()),
        }
        for name in names:
            if name not in ("id", "text"):
                filled[name] = batch.column(name)
        records = pa.RecordBatch.from_pydict(filled)
        yield ConvertedBatch(records, None, ids)
        position += batch.num_rows


def _from_objects(items: Iterable[Any]) -> Iterator[ConvertedBatch]:
    originals: list[AnyDocument] = []
    ids: list[str | int] = []
    texts: list[str] = []
    characters = 0
    for position, item in enumerate(items):
        id_, text = _id_and_text(item, position)
        originals.append(item)
        ids.append(id_)
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield _batch_of_objects(originals, ids, texts, position)
            originals, ids, texts, characters = [], [], [], 0
    if originals:
        yield _batch_of_objects(originals, ids, texts, position)


def _batch_of_objects(
    originals: list[AnyDocument], ids: list[str | int], texts: list[str], last: int
) -> ConvertedBatch:
    places = range(last + 2 - len(ids), last + 2)
    metadata = [_metadata(item) for item in originals]
    return ConvertedBatch(
        record_batch([str(i) for i in ids], texts, [""] * len(ids), places, metadata), originals, ids
    )


def _id_and_text(item: Any, position: int) -> tuple[str | int, str]:
    where = f"document {position}"
    id_: Any = position
    text: Any = item
    if isinstance(item, Document):
        id_, text = item.id, item.text
    elif isinstance(item, Mapping):
        id_, text = item.get("id", position), item.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the text is a {type(text).__name__}, expected a string, or a mapping with a string 'text'"
        )
    check_unicode(text, where)
    return (id_ if isinstance(id_, int) else str(id_)), text


def _metadata(item: AnyDocument) -> str | None:
    if not isinstance(item, Mapping):
        return None
    rest = {str(name): value for name, value in item.items() if name not in ("id", "text")}
    return orjson.dumps(rest, default=str).decode() if rest else None


def text_batches(texts: Iterable[str], characters: int = 2**21) -> Iterator[list[str]]:
    """Groups consecutive texts into lists of at least `characters` characters; only the last may have fewer."""
    batch: list[str] = []
    total = 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= characters:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch

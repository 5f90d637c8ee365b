"""The interface of a reader: it takes a range of a file and options, and returns batches of records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.formats.json_values import json_default
from deepseek_v3.data.formats.quarantine import MAX_RAW_BYTES, QUARANTINED, InvalidRecord
from deepseek_v3.data.formats.streams import InputFile

BATCH_BYTES = 2**22
BATCH_RECORDS = 10_000
END_OF_FILE = 2**63 - 1  # the position after which nothing is left to read

_MISSING = object()
_NAMES_SHOWN = 20
_ERROR_CHARACTERS = 500
_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class ReadOptions:
    """The fields that hold a record's text and id (`a.b` is field b of object a), and its largest size in bytes.

    If `text_field` is None, `read_range` finds it at the beginning of each file.
    """

    text_field: str | None = "text"
    id_field: str = "id"
    max_record_bytes: int = 2**26


@dataclass(frozen=True)
class FileRange:
    """The part of a file from `start` to `stop`, or to the end: rows of Parquet and Arrow files, else bytes."""

    file: InputFile
    start: int = 0
    stop: int | None = None


class ReadBatch(NamedTuple):
    """A batch of `RECORDS`, a batch of `QUARANTINED`, and the position at which reading continues after them."""

    records: pa.RecordBatch
    quarantined: pa.RecordBatch
    position: int


class BatchBuilder:
    """Collects the documents and the invalid records of one batch.

    The argument `place` of the methods is the value for the column `place` of `RECORDS`.
    """

    def __init__(self, source: str, options: ReadOptions) -> None:
        self._source, self._options = source, options
        self._text_field = options.text_field or "text"
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._places: list[int] = []
        self._metadata: list[str | None] = []
        self._rejected: list[dict[str, Any]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added or rejected yet."""
        return not self._ids and not self._rejected

    def add(self, place: int, record: Any) -> None:
        """Adds a record as a document; removes its text and its id from `record`, and keeps the rest as metadata.

        Raises InvalidRecord for a record that is not a document, and then adds nothing.
        """
        if type(record) is not dict:
            raise InvalidRecord(
                "not_object",
                f"holds {_type(record)}, expected an object with a field {self._text_field!r}",
            )
        text = take_field(record, self._text_field)
        if type(text) is not str:
            raise _no_text(self._text_field, text, record)
        id_ = take_field(record, self._options.id_field)
        if type(id_) is not str:
            id_ = self._id(id_, place)
        self.add_text(place, id_, text, record)

    def add_text(self, place: int, id_: str, text: str, metadata: dict[str, Any]) -> None:
        """Adds a document. Raises InvalidRecord, and then adds nothing, for an unusable text or metadata."""
        if "\0" in text:
            raise InvalidRecord("nul", f"the text has a NUL at character {text.index(chr(0))}; is it binary data?")
        limit = self._options.max_record_bytes
        if len(text) > limit // 4 and (size := len(text.encode())) > limit:
            raise InvalidRecord(
                "too_long", f"the text has {size} bytes, expected at most {limit} (max_record_bytes)"
            )
        self._metadata.append(_as_json(metadata) if metadata else None)
        self._ids.append(id_)
        self._texts.append(text)
        self._places.append(place)

    def reject(
        self,
        place: int,
        why: InvalidRecord,
        *,
        offset: int = -1,
        length: int = -1,
        records: int = 1,
        raw: bytes | None = None,
    ) -> None:
        """Adds an invalid record; the arguments are the columns of `QUARANTINED`."""
        self._rejected.append(
            {
                "source": self._source,
                "place": place,
                "offset": offset,
                "length": length,
                "records": records,
                "reason": why.reason,
                "error": why.error[:_ERROR_CHARACTERS],
                "raw": raw if raw is not None and len(raw) <= MAX_RAW_BYTES else None,
            }
        )

    def batch(self, position: int) -> ReadBatch:
        """The batch of everything added and rejected; reading continues at `position`."""
        sources = [self._source] * len(self._ids)
        records = record_batch(self._ids, self._texts, sources, self._places, self._metadata)
        return ReadBatch(records, pa.RecordBatch.from_pylist(self._rejected, schema=QUARANTINED), position)

    def _id(self, id_: Any, place: int) -> str:
        """The id of a record without an id, or with an integer as its id. Raises InvalidRecord for other types."""
        if id_ is None or id_ is _MISSING:
            return f"{self._source}:{place}"
        if type(id_) is int:
            return str(id_)
        field = self._options.id_field
        raise InvalidRecord("id_type", f"field {field!r} holds {_type(id_)}, expected a string or an integer")


def _no_text(field: str, text: Any, record: dict[str, Any]) -> InvalidRecord:
    if text is _MISSING:
        names = ", ".join(map(repr, sorted(record)[:_NAMES_SHOWN]))
        return InvalidRecord(
            "text_missing", f"has no field {field!r}, only [{names}]; say which one holds the text"
        )
    reason = "text_null" if text is None else "text_type"
    return InvalidRecord(reason, f"field {field!r} holds {_type(text)}, expected a string")


def _type(value: Any) -> str:
    return _TYPES.get(type(value), f"a {type(value).__name__}")


def take_field(record: dict[str, Any], field: str) -> Any:
    """Removes a field and returns it, or an object that no JSON value equals if there is none.

    `a.b` is a field of that name, or else field b of object a.
    """
    value = record.pop(field, _MISSING)
    if value is not _MISSING or "." not in field:
        return value
    outer, _, inner = field.partition(".")
    holder = record.get(outer)
    return take_field(holder, inner) if isinstance(holder, dict) else _MISSING


def _as_json(fields: dict[str, Any]) -> str:
    try:
        return orjson.dumps(fields, default=json_default).decode()
    except TypeError as error:
        reason = "nesting" if "ecursion" in str(error) else "metadata"
        raise InvalidRecord(reason, f"the other fields cannot be written as JSON: {error}") from None

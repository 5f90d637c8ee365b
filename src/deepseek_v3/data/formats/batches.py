"""The interface of a reader: it takes a range of a file and options, and returns batches of records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.formats.json_values import fields_to_json, parse_json, value_to_text
from deepseek_v3.data.formats.quarantine import MAX_RAW_BYTES, QUARANTINED, InvalidRecord
from deepseek_v3.data.formats.streams import InputFile

BATCH_BYTES = 2**22
BATCH_RECORDS = 10_000
END_OF_FILE = 2**63 - 1  # the position after which nothing is left to read

_MISSING = object()
_NAMES_SHOWN = 20
_FEW_NULS = 8  # NULs that any text may have, such as the padding of a fixed-width field
_MAX_NUL_SHARE = 0.1  # of the characters of a text; UTF-16 that was read as UTF-8 has a half
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


@dataclass(frozen=True)
class ReadBatch:
    """A batch of `RECORDS`, a batch of `QUARANTINED`, and the position at which reading continues after them.

    These three can be unpacked. `repaired` counts the records that were repaired, by the codes of `REPAIRS`, and
    `skipped` what is no document by the rules of its format, by the codes of `SKIPPED`.
    """

    records: pa.RecordBatch
    quarantined: pa.RecordBatch
    position: int
    repaired: Mapping[str, int]
    skipped: Mapping[str, int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.records, self.quarantined, self.position))

    @property
    def nbytes(self) -> int:
        """The bytes of the records and of the quarantined ones in memory."""
        return self.records.nbytes + self.quarantined.nbytes


def join_batches(batches: Sequence[ReadBatch]) -> ReadBatch:
    """Joins consecutive batches, also of several files, into one, whose position is that of the last."""
    if len(batches) == 1:
        return batches[0]
    repaired: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for batch in batches:
        repaired.update(batch.repaired)
        skipped.update(batch.skipped)
    return ReadBatch(
        pa.concat_batches([batch.records for batch in batches]),
        pa.concat_batches([batch.quarantined for batch in batches]),
        batches[-1].position,
        repaired,
        skipped,
    )


class BatchBuilder:
    """Collects the documents and the invalid records of one batch.

    They come from the file `source`, which changes if small files share a batch. The argument `place` of the
    methods is the value for the column `place` of `RECORDS`.
    """

    def __init__(self, source: str, options: ReadOptions) -> None:
        self.source = source
        self.size = 0  # characters of the texts, and bytes of what was rejected
        self._options = options
        self._text_field = options.text_field or "text"
        self._sources: list[str] = []
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._places: list[int] = []
        self._metadata: list[str | None] = []
        self._rejected: list[dict[str, Any]] = []
        self._repaired: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added, rejected or skipped yet."""
        return not self._ids and not self._rejected and not self._skipped

    @property
    def rows(self) -> int:
        """The number of documents."""
        return len(self._ids)

    def add_json(self, place: int, data: bytes, offset: int) -> None:
        """Adds the JSON value that starts at byte `offset` of its file. Raises InvalidRecord as `add` does."""
        parsed = parse_json(data, offset)
        self.add(place, parsed.value, parsed.repairs, parsed.not_utf8)

    def add(
        self, place: int, record: Any, repairs: tuple[str, ...] = (), not_utf8: InvalidRecord | None = None
    ) -> None:
        """Adds a record as a document; removes its text and its id from `record`, and keeps the rest as metadata.

        `repairs` are the codes of what was repaired in it. `not_utf8` is raised if it concerns the text: bytes that
        are not UTF-8 are U+FFFD in the record. Raises InvalidRecord for a record that is not a document, and then
        adds nothing.
        """
        if type(record) is not dict:
            raise InvalidRecord(
                "not_object",
                f"holds {json_type(record)}, expected an object with a field {self._text_field!r}",
            )
        text = take_field(record, self._text_field)
        if type(text) is not str:
            raise _no_text(self._text_field, text, record)
        if not_utf8 is not None and "\ufffd" in text:
            raise not_utf8
        id_ = take_field(record, self._options.id_field)
        if type(id_) is not str:
            id_, is_converted = self._id(id_, place)
            if is_converted:
                repairs += ("id_as_text",)
        self.add_text(place, id_, text, record, repairs)

    def add_text(
        self, place: int, id_: str, text: str, metadata: dict[str, Any], repairs: tuple[str, ...] = ()
    ) -> None:
        """Adds a document. Raises InvalidRecord, and then adds nothing, for an unusable text."""
        if "\0" in text:
            text = _without_nuls(text)
            repairs += ("nul",)
        limit = self._options.max_record_bytes
        if len(text) > limit // 4 and (size := len(text.encode())) > limit:
            raise InvalidRecord(
                "too_long", f"the text has {size} bytes, expected at most {limit} (max_record_bytes)"
            )
        as_json = None
        if metadata:
            as_json, is_whole = fields_to_json(metadata)
            if not is_whole:
                repairs += ("metadata",)
        if repairs:
            self._repaired.update(repairs)
        self.size += len(text)
        self._sources.append(self.source)
        self._metadata.append(as_json)
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
        raw = raw if raw is not None and len(raw) <= MAX_RAW_BYTES else None
        self.size += len(raw or b"")
        self._rejected.append(
            {
                "source": self.source,
                "place": place,
                "offset": offset,
                "length": length,
                "records": records,
                "reason": why.reason,
                "error": why.error[:_ERROR_CHARACTERS],
                "raw": raw,
            }
        )

    def skip(self, code: str) -> None:
        """Counts what is no document by the rules of its format, by a code of `SKIPPED`."""
        self._skipped[code] += 1

    def batch(self, position: int) -> ReadBatch:
        """The batch of everything added and rejected; reading continues at `position`."""
        records = record_batch(self._ids, self._texts, self._sources, self._places, self._metadata)
        rejected = self._rejected
        quarantined = pa.RecordBatch.from_pylist(rejected, schema=QUARANTINED) if rejected else _nothing_rejected()
        return ReadBatch(records, quarantined, position, self._repaired, self._skipped)

    def _id(self, id_: Any, place: int) -> tuple[str, bool]:
        """The id of a record whose id is missing or not a string, and whether it was converted to text.

        A float without a fraction is written as an integer, because pandas turns integers with gaps into floats;
        its NaN stands for a missing id. Bytes that are no text are written in hexadecimal.
        """
        if id_ is None or id_ is _MISSING or (isinstance(id_, float) and not math.isfinite(id_)):
            return f"{self.source}:{place}", False
        if type(id_) is int:
            return str(id_), False
        if isinstance(id_, bytes):
            text = id_.decode(errors="replace")
            is_text = text.isprintable() and "\ufffd" not in text
            return (text, False) if is_text else (id_.hex(), True)
        if isinstance(id_, float) and id_.is_integer():
            id_ = int(id_)
        return value_to_text(id_), True


@cache
def _nothing_rejected() -> pa.RecordBatch:
    """A batch of no rows, made once: most files of a folder of small ones hold nothing to reject."""
    return pa.RecordBatch.from_pylist([], schema=QUARANTINED)


def _no_text(field: str, text: Any, record: dict[str, Any]) -> InvalidRecord:
    if text is _MISSING:
        names = ", ".join(map(repr, sorted(record)[:_NAMES_SHOWN]))
        return InvalidRecord(
            "text_missing", f"has no field {field!r}, only [{names}]; say which one holds the text"
        )
    reason = "text_null" if text is None else "text_type"
    return InvalidRecord(reason, f"field {field!r} holds {json_type(text)}, expected a string")


def json_type(value: Any) -> str:
    """The type of a value in the words of JSON, for messages."""
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


def _without_nuls(text: str) -> str:
    """The text without NUL characters (U+0000).

    Raises InvalidRecord if it has too many of them to be text: then it is binary data, or was decoded wrongly.
    """
    nuls = text.count("\0")
    if nuls == len(text) or (nuls > _FEW_NULS and nuls > _MAX_NUL_SHARE * len(text)):
        problem = f"{nuls} of its {len(text)} characters are NULs, the first is character {text.index(chr(0))}"
        raise InvalidRecord("nul", f"{problem}; is it binary data, or UTF-16?")
    return text.replace("\0", "")

"""Gives each record whose id others have an id of its own, so that an id names one document.

Ids that are unique within each file alone, such as row numbers, occur once per file. Such an id becomes
`source:id`, or `source:place:id` if that name is taken, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from typing_extensions import override

from deepseek_v3.data.arrays import BoolArray, Int64Array, UInt64Array, find_sorted
from deepseek_v3.data.deduplication import repeated_hashes
from deepseek_v3.data.deduplication.key_files import key_ranges, map_keys
from deepseek_v3.data.documents import RECORDS, with_column
from deepseek_v3.data.formats.quarantine import MAX_RAW_BYTES, QUARANTINED
from deepseek_v3.data.pipeline.run_folder import read_table
from deepseek_v3.data.stages import Drop, GlobalStage, IdLookup, NumberedPart, Outcome, Task, group_by_part, outcome

_BYTES_PER_KEY = 200  # the most memory that a match task needs for each id
_QUALIFIED_FILE = "qualified.npy"  # int64: the documents with a new id, ascending
_IDS_FILE = "ids.arrow"  # their new ids, in the same order
_REPEATED_FILE = "repeated.npy"  # int64: the documents whose id, source and place another document has


class UniqueIds(GlobalStage):
    """Qualifies each id that several records have by its source, and where that does not suffice, by its place.

    Drops a record only if another one has the same id, source and place. Ids are compared by their XXH3-128.
    """

    name = "unique_ids"

    @override
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        rows = np.arange(table.num_rows, dtype=np.uint32)
        repeated_hashes.write_keys(folder, _hashes(table.column("id").to_pylist()), rows, np.zeros_like(rows))

    @override
    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:
        ranges = key_ranges(repeated_hashes.count_texts(parts) * _BYTES_PER_KEY, memory)
        return [Task("match", (tuple(parts), low, high)) for low, high in ranges]

    def match(self, output: Path, parts: Sequence[NumberedPart], low: int, high: int) -> None:
        """Writes the repeats among the ids whose first hash half is in [low, high)."""
        np.save(output, repeated_hashes.find_repeats(parts, low, high))

    @override
    def resolve(
        self, parts: Sequence[NumberedPart], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        repeats = repeated_hashes.read_repeats(matches)
        colliding = np.union1d(repeats["document"], repeats["first"])
        hashes = _qualified_hashes(parts, colliding, np.zeros(len(colliding), np.bool_))
        by_place = _are_taken(hashes, parts)
        hashes[by_place] = _qualified_hashes(parts, colliding[by_place], by_place[by_place])
        repeated = by_place & _are_taken(hashes, parts)
        np.save(folder / _QUALIFIED_FILE, colliding)
        np.save(folder / _REPEATED_FILE, colliding[repeated])
        schema = pa.schema([RECORDS.field("id")])
        with pa.OSFile(str(folder / _IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for ids in _qualified(parts, colliding, by_place):
                writer.write_batch(pa.RecordBatch.from_arrays([pa.array(ids, pa.string())], schema=schema))
        return {"duplicates": int(repeated.sum()), "qualified": int((~repeated).sum())}

    @override
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        ids = unique_ids(folder, documents, batch.column("id"))
        rows = np.flatnonzero(np.isin(documents, np.load(folder / _REPEATED_FILE)))
        drops = [Drop(row, "duplicate_id") for row in rows.tolist()]
        return outcome(self.name, with_column(batch, RECORDS.field("id"), ids), drops)

    @override
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        mask = np.zeros(sum(part.rows for part in parts), np.bool_)
        mask[np.load(folder / _REPEATED_FILE)] = True
        return mask


def unique_ids(folder: Path, documents: Int64Array, ids: pa.Array) -> pa.Array:
    """Replaces the ids with which documents were read by those that the decisions in `folder` give them.

    `documents`, int64 [n], are the numbers of the documents.
    """
    rows = find_sorted(np.load(folder / _QUALIFIED_FILE, mmap_mode="r"), documents)
    found = rows >= 0
    if not found.any():
        return ids
    new = read_table(folder / _IDS_FILE).column("id").take(pa.array(rows[found])).combine_chunks()
    return pc.replace_with_mask(ids, pa.array(found), new)


def _hashes(ids: Sequence[str]) -> UInt64Array:
    """The XXH3-128 of ids: uint64 [ids, 2]."""
    digests = b"".join(xxhash.xxh3_128_digest(id_.encode()) for id_ in ids)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _qualified(parts: Sequence[NumberedPart], documents: Int64Array, by_place: BoolArray) -> Iterator[list[str]]:
    """The qualified ids of ascending documents, part by part; `by_place` marks those that name the place, too."""
    for part, chosen in group_by_part(parts, documents):
        assert part.records is not None, "this stage has no documents of previous runs"
        table = read_table(part.records).select(["source", "place", "id"])
        columns = [column.to_pylist() for column in table.take(pa.array(documents[chosen] - part.first)).columns]
        yield [
            f"{source}:{place}:{id_}" if needs_place else f"{source}:{id_}"
            for source, place, id_, needs_place in zip(*columns, by_place[chosen].tolist(), strict=True)
        ]


def _qualified_hashes(parts: Sequence[NumberedPart], documents: Int64Array, by_place: BoolArray) -> UInt64Array:
    hashes = [_hashes(ids) for ids in _qualified(parts, documents, by_place)]
    return np.concatenate([np.zeros((0, 2), np.uint64), *hashes])


def _are_taken(hashes: UInt64Array, parts: Sequence[NumberedPart]) -> BoolArray:
    """Marks the hashes (uint64 [n, 2]) that occur twice, or that are those of an id in the input: bool [n].

    Compares the first halves alone, so once in 2^64 a free name counts as taken.
    """
    names, inverse, counts = np.unique(hashes[:, 0], return_inverse=True, return_counts=True)
    taken = counts > 1
    for part in parts if len(names) else ():
        found = find_sorted(names, map_keys(part, "hashes.npy")[0])
        taken[found[found >= 0]] = True
    return taken[inverse]


def as_quarantined(batch: pa.RecordBatch, result: Outcome) -> pa.RecordBatch:
    """The records of a batch that `UniqueIds` dropped, as `QUARANTINED`."""
    rows = [
        {
            "source": record["source"],
            "place": record["place"],
            "offset": -1,
            "length": -1,
            "records": 1,
            "reason": "duplicate_id",
            "error": f"another record has the id {record['id']!r}, even with source and place; rename one of them",
            "raw": _raw(record),
        }
        for record in batch.filter(pa.array(~result.kept_rows)).to_pylist()
    ]
    return pa.RecordBatch.from_pylist(rows, QUARANTINED)


def _raw(record: dict[str, Any]) -> bytes | None:
    raw = orjson.dumps({name: record[name] for name in ("id", "text", "metadata")})
    return raw if len(raw) <= MAX_RAW_BYTES else None

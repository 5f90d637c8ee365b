"""Quarantines each record whose id an earlier record has, so that an id names one document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from typing_extensions import override

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.deduplication import repeated_hashes
from deepseek_v3.data.deduplication.key_files import key_ranges
from deepseek_v3.data.formats.quarantine import MAX_RAW_BYTES, QUARANTINED
from deepseek_v3.data.stages import Drop, GlobalStage, IdLookup, NumberedPart, Outcome, Task, outcome

_BYTES_PER_KEY = 200  # the most memory that a match task needs for each id


class UniqueIds(GlobalStage):
    """Drops each record whose id an earlier record has. Ids are compared by their XXH3-128."""

    name = "unique_ids"

    @override
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        digests = b"".join(xxhash.xxh3_128_digest(id_.encode()) for id_ in table.column("id").to_pylist())
        rows = np.arange(table.num_rows, dtype=np.uint32)
        repeated_hashes.write_keys(
            folder, np.frombuffer(digests, np.uint64).reshape(-1, 2), rows, np.zeros_like(rows)
        )

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
        repeated = repeated_hashes.read_repeats(matches)["document"]
        np.save(folder / "repeated.npy", repeated)
        return {"duplicates": len(repeated)}

    @override
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        repeated = np.load(folder / "repeated.npy")
        rows = np.flatnonzero(np.isin(documents, repeated))
        return outcome(self.name, batch, [Drop(row, "duplicate_id") for row in rows.tolist()])

    @override
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        mask = np.zeros(sum(part.rows for part in parts), np.bool_)
        mask[np.load(folder / "repeated.npy")] = True
        return mask


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
            "error": f"the id {record['id']!r} belongs to a record before this one; give each record a unique id",
            "raw": _raw(record),
        }
        for record in batch.filter(pa.array(~result.kept_rows)).to_pylist()
    ]
    return pa.RecordBatch.from_pylist(rows, QUARANTINED)


def _raw(record: dict[str, Any]) -> bytes | None:
    raw = orjson.dumps({name: record[name] for name in ("id", "text", "metadata")})
    return raw if len(raw) <= MAX_RAW_BYTES else None

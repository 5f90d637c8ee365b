"""Ids name one document each: a record whose id an earlier one has is set aside, like any broken record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from typing_extensions import override

from deepseek_v3.data.formats.quarantine import QUARANTINED, RAW_BYTES
from deepseek_v3.data.stages import CorpusStage, Drop, Outcome, Part, Task, outcome

_BYTES_PER_DOCUMENT = 64  # while matching: hashes, numbers, sorting

Int64s = NDArray[np.int64]


class UniqueIds(CorpusStage):
    """Drops every record but the first of those with the same id, by XXH3-128 of the id."""

    name = "unique_ids"

    @override
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        ids = table.column("id").to_pylist()
        digests = b"".join(xxhash.xxh3_128_digest(id_.encode()) for id_ in ids)
        np.save(folder / "hashes.npy", np.frombuffer(digests, np.uint64).reshape(-1, 2))

    @override
    def match_tasks(self, parts: Sequence[Part], memory: int) -> list[Task]:
        documents = sum(part.rows for part in parts)
        ranges = max(1, -(-documents * _BYTES_PER_DOCUMENT // memory))
        cuts = [2**64 * index // ranges for index in range(ranges + 1)]
        return [Task("match", (tuple(parts), low, high - 1)) for low, high in pairwise(cuts)]

    def match(self, output: Path, parts: Sequence[Part], low: int, high: int) -> None:
        """Writes the documents whose id an earlier one has, int64 [n], for hashes from `low` to `high`."""
        hashes, numbers = _in_range(parts, np.uint64(low), np.uint64(high))
        order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
        hashes, numbers = hashes[order], numbers[order]
        repeated = np.zeros(len(numbers), np.bool_)
        repeated[1:] = (hashes[1:] == hashes[:-1]).all(axis=1)
        np.save(output, numbers[repeated])

    @override
    def refine_tasks(self, parts: Sequence[Part], memory: int, matches: Sequence[Path]) -> list[Task]:
        return []

    @override
    def resolve(
        self, parts: Sequence[Part], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        repeated = np.sort(np.concatenate([np.load(file) for file in matches]))
        np.save(folder / "repeated.npy", repeated)
        return {"duplicates": len(repeated)}

    @override
    def apply(
        self,
        batch: pa.RecordBatch,
        documents: Int64s,
        folder: Path,
        ids_of: Callable[[Int64s], list[str]],
    ) -> Outcome:
        repeated = np.load(folder / "repeated.npy")
        rows = np.flatnonzero(np.isin(documents, repeated))
        return outcome(self.name, batch, [Drop(row, "duplicate_id") for row in rows.tolist()])

    @override
    def removed(self, parts: Sequence[Part], folder: Path) -> NDArray[np.bool_]:
        mask = np.zeros(sum(part.rows for part in parts), np.bool_)
        mask[np.load(folder / "repeated.npy")] = True
        return mask


def set_aside(batch: pa.RecordBatch, result: Outcome) -> pa.RecordBatch:
    """The records that `UniqueIds` dropped, as `QUARANTINED`."""
    rows = [
        {
            "source": record["source"],
            "place": record["place"],
            "offset": -1,
            "length": -1,
            "records": 1,
            "reason": "duplicate_id",
            "error": f"the id {record['id']!r} belongs to a record before this one; give each record its own",
            "raw": _raw(record),
        }
        for record in batch.filter(pa.array(~result.kept_rows)).to_pylist()
    ]
    return pa.RecordBatch.from_pylist(rows, QUARANTINED)


def _raw(record: dict[str, Any]) -> bytes | None:
    raw = orjson.dumps({name: record[name] for name in ("id", "text", "metadata")})
    return raw if len(raw) <= RAW_BYTES else None


def _in_range(parts: Sequence[Part], low: np.uint64, high: np.uint64) -> tuple[NDArray[np.uint64], Int64s]:
    hashes = [np.zeros((0, 2), np.uint64)]
    numbers: list[Int64s] = [np.zeros(0, np.int64)]
    for part in parts:
        keys = np.load(part.keys / "hashes.npy", mmap_mode="r")
        chosen = np.flatnonzero((keys[:, 0] >= low) & (keys[:, 0] <= high))
        hashes.append(keys[chosen])
        numbers.append((chosen + part.first).astype(np.int64))
    return np.concatenate(hashes), np.concatenate(numbers)

"""Counts of documents before and after each stage, with reasons and samples. Parts may be added in any order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.stages import Outcome

_SAMPLES = 5  # the most samples of each stage and reason
_EXCERPT_CHARACTERS = 600


class Stats:
    """Nested counts, and five samples for each stage and reason.

    `counts` holds
    - `read`: `documents`, `bytes`, `records` (including quarantined ones), and `lengths`;
    - `quarantined`: records by reason; `repaired`: records by kind of repair; `skipped`: what is no document by the
      rules of its format, by kind;
    - `stages`: for each stage `in` and `out` (`documents`, `bytes`), `reasons` (`documents`, `bytes`), `sources`
      (`in`, `out`), and `observed` (`before`, `after`: counts by value, numbers rounded to two significant digits);
    - `kept`: `documents`, `bytes`, `tokens`, `copies`, `lengths`, `sources`.
    Bytes are bytes of text in UTF-8. `lengths` counts documents by floor(log2(1 + bytes)).

    `samples` are, among the first five of each batch, the documents with the lowest hashes of source and place, so
    they do not depend on the order of the parts.
    """

    def __init__(
        self, counts: dict[str, Any] | None = None, samples: dict[str, list[dict[str, Any]]] | None = None
    ):
        self.counts: dict[str, Any] = counts or {}
        self.samples: dict[str, list[dict[str, Any]]] = samples or {}

    def read(self, records: pa.RecordBatch, quarantined: pa.RecordBatch) -> None:
        """Counts a batch of documents that was read, and the records that could not be read."""
        lengths = pc.binary_length(records.column("text"))
        failed = int(pc.sum(quarantined.column("records")).as_py() or 0)
        self._add(
            "read",
            {
                "documents": records.num_rows,
                "records": records.num_rows + failed,
                "bytes": _sum(lengths),
                "lengths": _by_log2(lengths),
            },
        )
        self.quarantine(quarantined)

    def quarantine(self, quarantined: pa.RecordBatch) -> None:
        """Counts quarantined records by reason."""
        reasons = zip(
            quarantined.column("reason").to_pylist(), quarantined.column("records").to_pylist(), strict=True
        )
        for reason, records in reasons:
            self._add("quarantined", {reason: records})

    def repaired(self, records: Mapping[str, int]) -> None:
        """Counts repaired records by the kind of repair."""
        self._add("repaired", dict(records))

    def skipped(self, counts: Mapping[str, int]) -> None:
        """Counts what is no document by the rules of its format, by kind."""
        self._add("skipped", dict(counts))

    def stage(self, name: str, before: pa.RecordBatch, result: Outcome) -> None:
        """Counts the result of a stage for the batch `before`, and samples the documents that it dropped."""
        lengths = pc.binary_length(before.column("text")).to_numpy(zero_copy_only=False)
        gone = np.flatnonzero(~result.kept_rows)
        groups = source_groups(before.column("source"))
        kept_groups = Counter(group for group, kept in zip(groups, result.kept_rows.tolist(), strict=True) if kept)
        reasons: dict[str, dict[str, int]] = {}
        for row, reason in zip(gone.tolist(), result.dropped.column("reason").to_pylist(), strict=True):
            removed = reasons.setdefault(reason, {"documents": 0, "bytes": 0})
            removed["documents"] += 1
            removed["bytes"] += int(lengths[row])
        count = {
            "in": {"documents": before.num_rows, "bytes": int(lengths.sum())},
            "out": {
                "documents": int(result.kept_rows.sum()),
                "bytes": _sum(pc.binary_length(result.kept.column("text"))),
            },
            "reasons": reasons,
            "sources": {group: {"in": n, "out": kept_groups[group]} for group, n in Counter(groups).items()},
            "observed": {
                what: {"before": _histogram(values), "after": _histogram(_chosen(values, result.kept_rows))}
                for what, values in _observed(before, result).items()
            },
        }
        self._add("stages", {name: count})
        self._sample(name, before, gone, result.dropped)

    def kept(self, batch: pa.RecordBatch, tokens: int) -> None:
        """Counts a batch that is written."""
        lengths = pc.binary_length(batch.column("text"))
        count = {
            "documents": batch.num_rows,
            "bytes": _sum(lengths),
            "tokens": tokens,
            "lengths": _by_log2(lengths),
            "sources": dict(Counter(source_groups(batch.column("source")))),
        }
        self._add("kept", count)
        self._keep_lowest("kept", [_sample_of(batch, row, {}) for row in range(min(batch.num_rows, _SAMPLES))])

    def copies(self, copies: int) -> None:
        """Counts `copies` of the written documents as copies of others."""
        self._add("kept", {"documents": -copies, "copies": copies})

    def add(self, other: Stats) -> None:
        """Adds the counts and samples of `other`."""
        _merge(self.counts, other.counts)
        for key, samples in other.samples.items():
            self._keep_lowest(key, samples)

    def to_json(self) -> bytes:
        """Counts and samples as JSON with sorted keys."""
        return orjson.dumps({"counts": self.counts, "samples": self.samples}, option=orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, data: bytes) -> Stats:
        """Reads the output of `to_json`."""
        fields = orjson.loads(data)
        return cls(fields["counts"], fields["samples"])

    def _add(self, name: str, counts: dict[str, Any]) -> None:
        _merge(self.counts.setdefault(name, {}), counts)

    def _sample(self, stage: str, before: pa.RecordBatch, gone: Int64Array, dropped: pa.RecordBatch) -> None:
        rows = dropped.select(["reason", "figures", "trigger"]).to_pylist()
        found: dict[str, list[tuple[int, int]]] = {}
        for index, (row, drop) in enumerate(zip(gone.tolist(), rows, strict=True)):
            found.setdefault(drop["reason"], []).append((row, index))
        for reason, places in found.items():
            # Takes the first documents of a batch; among batches, those with the lowest hashes.
            samples = [_sample_of(before, row, rows[index]) for row, index in places[:_SAMPLES]]
            self._keep_lowest(f"{stage}/{reason}", samples)

    def _keep_lowest(self, key: str, samples: Sequence[dict[str, Any]]) -> None:
        everyone = sorted([*self.samples.get(key, []), *samples], key=lambda sample: sample["order"])
        self.samples[key] = everyone[:_SAMPLES]


def empty_stage_counts() -> dict[str, Any]:
    """The counts of a stage that received no document."""
    nothing = {"documents": 0, "bytes": 0}
    return {"in": {**nothing}, "out": {**nothing}, "reasons": {}, "sources": {}, "observed": {}}


def source_groups(sources: pa.Array) -> list[str]:
    """The group of each source for the report: the first folder of its name, or the name if it has no folder."""
    encoded = sources.dictionary_encode()
    groups = [name.split("/", 1)[0] for name in encoded.dictionary.to_pylist()]
    return [groups[index] for index in encoded.indices.to_pylist()]


def _sample_of(batch: pa.RecordBatch, row: int, drop: Mapping[str, Any]) -> dict[str, Any]:
    source, place = batch.column("source")[row].as_py(), batch.column("place")[row].as_py()
    text = batch.column("text")[row].as_py()
    return {
        "order": xxhash.xxh3_64_hexdigest(f"{source}:{place}".encode()),
        "id": batch.column("id")[row].as_py(),
        "source": source,
        "place": place,
        "figures": drop.get("figures"),
        "trigger": drop.get("trigger"),
        "text": text[:_EXCERPT_CHARACTERS],
        "characters": len(text),
    }


def _merge(total: dict[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, Mapping):
            _merge(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def _observed(before: pa.RecordBatch, result: Outcome) -> dict[str, Sequence[Any]]:
    """What a stage observed, and the languages of its documents if a stage before it labelled them."""
    labelled = "language" in before.schema.names and "language" not in result.observed
    return {**result.observed, **({"language": before.column("language").to_pylist()} if labelled else {})}


def _sum(lengths: pa.Array) -> int:
    return int(pc.sum(lengths).as_py() or 0)


def _by_log2(lengths: pa.Array) -> dict[str, int]:
    bins = np.floor(np.log2(1 + lengths.to_numpy(zero_copy_only=False))).astype(np.int64)
    return {str(size): int(count) for size, count in enumerate(np.bincount(bins)) if count} if len(bins) else {}


def _chosen(values: Sequence[Any], rows: BoolArray) -> list[Any]:
    return [value for value, chosen in zip(values, rows.tolist(), strict=True) if chosen]


def _histogram(values: Sequence[Any]) -> dict[str, int]:
    return dict(Counter(_shown(value) for value in values if value is not None))


def _shown(value: Any) -> str:
    """A number rounded to two significant digits, which keeps histograms small; a word unchanged."""
    if isinstance(value, str):
        return value
    number = float(value)
    return f"{number:.2g}" if math.isfinite(number) else "not finite"

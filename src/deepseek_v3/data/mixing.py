"""Mixing: the number of copies of each document in a corpus of a given size, with given shares of its sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from typing_extensions import override

from deepseek_v3.config.filter_config import MixingConfig
from deepseek_v3.config.loading import load_config, section_from_dict
from deepseek_v3.data.arrays import BoolArray, Float64Array, Int32Array, Int64Array, UInt64Array
from deepseek_v3.data.documents import RECORDS, with_column
from deepseek_v3.data.stages import Drop, GlobalStage, IdLookup, NumberedPart, Outcome, outcome
from deepseek_v3.data.tokens.token_counter import TokenCounter
from deepseek_v3.planning.token_budget import budget_in_tokens
from deepseek_v3.utils.logging import get_logger

_EVERYTHING = "*"
_NO_SOURCE = -1
_COPIES_AT_A_TIME = 2**13

_log = get_logger("Mixing")


class Mixer(GlobalStage):
    """Repeats and drops whole documents so that the sources have their weights and the corpus its size.

    Takes the options of `MixingConfig`; `counter` counts the tokens of texts. The source of a document is the first
    pattern of the weights that matches the name of its file. Reasons for a drop: `no_weight` if no pattern matches,
    `over_budget` if the budget has no room. The ids of copies end in `#2`, `#3` and so on.
    """

    name = "mixing"

    def __init__(self, counter: TokenCounter, **options: Any) -> None:
        self.options = section_from_dict(MixingConfig, options, "Mixer")
        self._counter = counter
        self._budget = self.options.tokens
        if self.options.for_config is not None:
            self._budget = budget_in_tokens(load_config(self.options.for_config))
        self._patterns = list(self.options.weights) or [_EVERYTHING]
        self._weights = np.array(list(self.options.weights.values()) or [1.0])

    @override
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        texts = table.column("text").combine_chunks()
        np.save(folder / "tokens.npy", self._counter.per_document(texts))
        ids = table.column("id").to_pylist()
        np.save(
            folder / "order.npy",
            np.array([xxhash.xxh3_64_intdigest(i.encode(), self.options.seed) for i in ids], np.uint64),
        )
        encoded = table.column("source").combine_chunks().dictionary_encode()
        groups = np.array([self._source(name) for name in encoded.dictionary.to_pylist()], np.int32)
        np.save(folder / "sources.npy", groups[encoded.indices.to_numpy()] if len(ids) else groups)

    @override
    def resolve(
        self, parts: Sequence[NumberedPart], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        tokens, order, sources = (_load_keys(parts, name) for name in ("tokens", "order", "sources"))
        present = ~np.concatenate([part.removed_rows() for part in parts])
        available = np.array(
            [int(tokens[present & (sources == number)].sum()) for number in range(len(self._patterns))], np.int64
        )
        budget = self._budget or int(available.sum())
        targets = tokens_per_source(self._weights, available, budget, self.options.max_epochs)
        if targets.sum() < 0.999 * budget:
            _log.warning(
                "%s tokens, %.1f%% of the budget of %s: the sources give no more with max_epochs = %s",
                *(f"{int(targets.sum()):,}", 100 * targets.sum() / budget, f"{budget:,}", self.options.max_epochs),
            )
        copies = np.zeros(len(tokens), np.int64)
        for number, target in enumerate(targets.tolist()):
            chosen = np.flatnonzero(present & (sources == number))
            copies[chosen] = copies_per_document(tokens[chosen], order[chosen], target)
        np.save(folder / "copies.npy", copies)
        np.save(folder / "sources.npy", sources)
        return self._figures(tokens, sources, copies, available, targets)

    @override
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        copies = np.load(folder / "copies.npy", mmap_mode="r")[documents]
        sources = np.load(folder / "sources.npy", mmap_mode="r")[documents]
        drops = [
            Drop(int(row), "no_weight" if sources[row] == _NO_SOURCE else "over_budget")
            for row in np.flatnonzero(copies == 0)
        ]
        result = outcome(self.name, batch, drops)
        return replace(result, copies=copies[result.kept_rows].astype(np.int64))

    @override
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        return np.load(folder / "copies.npy") == 0

    def _source(self, name: str) -> int:
        fitting = (number for number, pattern in enumerate(self._patterns) if fnmatchcase(name, pattern))
        return next(fitting, _NO_SOURCE)

    def _figures(
        self,
        tokens: Int64Array,
        sources: Int32Array,
        copies: Int64Array,
        available: Int64Array,
        targets: Float64Array,
    ) -> dict[str, Any]:
        mixed = {}
        for number, pattern in enumerate(self._patterns):
            chosen = sources == number
            taken = int((tokens * copies)[chosen].sum())
            mixed[pattern] = {
                "documents": int(copies[chosen].sum()),
                "tokens": taken,
                "target": round(float(targets[number])),
                "epochs": round(taken / int(available[number]), 4) if available[number] else 0.0,
            }
        return {"tokens": int((tokens * copies).sum()), "sources": mixed}


def tokens_per_source(weights: Float64Array, available: Int64Array, budget: int, max_epochs: float) -> Float64Array:
    """The tokens to take from each source: float64 [sources].

    A source gives tokens in proportion to its weight, but at most `max_epochs` times its `available` tokens. The
    other sources make up for the rest, in proportion to their weights.
    """
    most = available * max_epochs
    targets = np.zeros(len(weights))
    open_ = most > 0
    while open_.any():
        left = budget - targets[~open_].sum()
        share = weights / weights[open_].sum() * left
        full = open_ & (share >= most)
        if not full.any():
            return np.where(open_, share, targets)
        targets[full] = most[full]
        open_ &= ~full
    return targets


def copies_per_document(tokens: Int64Array, order: UInt64Array, target: float) -> Int64Array:
    """The number of copies of each document for `target` tokens in total: int64 [n].

    Takes every document the same number of times, then the first ones in `order` once more. The last of these is
    taken only if that brings the total closer to the target.
    """
    total = int(tokens.sum())
    if total == 0:
        return np.zeros(len(tokens), np.int64)
    rounds, rest = divmod(target, total)
    copies = np.full(len(tokens), int(rounds), np.int64)
    ranked = np.lexsort((np.arange(len(tokens)), order))
    ends = np.cumsum(tokens[ranked])
    copies[ranked[ends - tokens[ranked] / 2 <= rest]] += 1
    return copies


def repeat_documents(kept: pa.RecordBatch, copies: Int64Array, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """Yields each document `copies` times, its copies one after the other, in batches of at most `batch_bytes`.

    A batch holds more bytes of text only if one document does. All copies together may take any memory.
    """
    if not (copies > 1).any():
        yield kept
        return
    ends = np.cumsum(copies)
    sizes = pc.binary_length(kept.column("text")).to_numpy(zero_copy_only=False).astype(np.int64)
    first = 0
    while first < ends[-1]:
        last = min(first + _COPIES_AT_A_TIME, int(ends[-1]))
        rows = np.searchsorted(ends, np.arange(first, last), side="right")
        fitting = max(int(np.searchsorted(np.cumsum(sizes[rows]), batch_bytes, side="right")), 1)
        rows = rows[:fitting]
        turns = np.arange(first, first + len(rows)) - (ends - copies)[rows]
        repeated = kept.take(pa.array(rows))
        ids = repeated.column("id").to_pylist()
        named = [f"{id_}#{turn + 1}" if turn else id_ for id_, turn in zip(ids, turns.tolist(), strict=True)]
        yield with_column(repeated, RECORDS.field("id"), named)
        first += len(rows)


def _load_keys(parts: Sequence[NumberedPart], name: str) -> Any:
    return np.concatenate([np.load(part.keys / f"{name}.npy") for part in parts])

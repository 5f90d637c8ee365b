"""What every stage of the pipeline is: a pure function from a batch to what it keeps and what it drops, and why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import orjson
import pyarrow as pa

from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.documents import AnyDocument, ConvertedBatch, Documents, convert_back, convert_documents

# `figures` is a JSON object, such as {"found": 0.31, "limit": 0.2}; `trigger` the piece of text that decided.
DROPPED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("figures", pa.string(), nullable=False),
        pa.field("trigger", pa.string()),
    ]
)
_TRIGGER_CHARACTERS = 200


@dataclass(frozen=True)
class Drop:
    """Why the document in `row` of a batch is dropped: a reason's code, its figures, the text that decided."""

    row: int
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    trigger: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a stage makes of a batch.

    `kept_rows` says for each row of the batch whether it goes on; `kept` are those, in order, perhaps changed.
    `dropped` are the others, in order (`DROPPED`). `observed` gives, by name, a number or a word for each row of
    the batch (kept or not), to be shown as histograms: a score, a language.
    """

    kept: pa.RecordBatch
    kept_rows: BoolArray
    dropped: pa.RecordBatch
    observed: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def outcome(
    stage: str,
    batch: pa.RecordBatch,
    drops: Sequence[Drop],
    observed: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """The outcome of dropping rows of `batch`, which already has the texts and columns that go on."""
    kept_rows = np.ones(batch.num_rows, np.bool_)
    drops = sorted(drops, key=lambda drop: drop.row)
    rows = pa.array([drop.row for drop in drops], pa.int64())
    kept_rows[rows.to_numpy(zero_copy_only=False)] = False
    gone = batch.select(["id", "source", "place"]).take(rows)
    dropped = pa.RecordBatch.from_arrays(
        [
            *gone.columns,
            pa.array([stage] * len(drops), pa.string()),
            pa.array([drop.reason for drop in drops], pa.string()),
            pa.array([orjson.dumps(dict(drop.figures)).decode() for drop in drops], pa.string()),
            pa.array([drop.trigger and drop.trigger[:_TRIGGER_CHARACTERS] for drop in drops], pa.string()),
        ],
        schema=DROPPED,
    )
    kept = batch.filter(pa.array(kept_rows)) if drops else batch
    return Outcome(kept, kept_rows, dropped, observed or {})


class Filtered(NamedTuple):
    """What a stage kept of the documents that it was given.

    `documents` are of the caller's own kind, or an Arrow table where Arrow data was given; `ids` are theirs, or
    positions counted from 0. `stats` holds `documents`, `kept`, `dropped`, and the number dropped by `reasons`.
    """

    documents: list[AnyDocument] | pa.Table
    ids: list[str | int]
    stats: dict[str, Any]


class Stage(ABC):
    """A stage that judges each document by itself. `apply` is a pure function: no state, no order."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Judges a batch of `RECORDS`. Never raises for any text."""

    def filter(self, documents: Documents) -> Filtered:
        """Applies the stage to texts, Documents, mappings or Arrow data, given as a list, an iterator or a table.

        Raises DataError where one of them is no document.
        """
        collected = FilteredBuilder()
        for given in convert_documents(documents):
            collected.add(given, self.apply(given.records))
        return collected.result()


class FilteredBuilder:
    """Gathers what is kept of batch after batch."""

    def __init__(self) -> None:
        self._documents: list[AnyDocument] = []
        self._batches: list[pa.RecordBatch] = []
        self._ids: list[str | int] = []
        self._reasons: Counter[str] = Counter()
        self._total = 0

    def add(self, given: ConvertedBatch, result: Outcome) -> None:
        """Adds what a stage kept of a batch, and counts the reasons of what it dropped."""
        rows = np.flatnonzero(result.kept_rows).tolist()
        documents = convert_back(given, result.kept, rows)
        if isinstance(documents, list):
            self._documents += documents
        else:
            self._batches.append(documents)
        self._ids += [given.ids[row] for row in rows]
        self._total += given.records.num_rows
        self._reasons.update(result.dropped.column("reason").to_pylist())

    def result(self) -> Filtered:
        """All of it."""
        documents = pa.Table.from_batches(self._batches) if self._batches else self._documents
        reasons = dict(sorted(self._reasons.items()))
        stats = {
            "documents": self._total,
            "kept": len(self._ids),
            "dropped": self._total - len(self._ids),
            "reasons": reasons,
        }
        return Filtered(documents, self._ids, stats)


# Returns the ids of documents, given their numbers.
IdLookup: TypeAlias = Callable[[Int64Array], list[str]]


@dataclass(frozen=True)
class NumberedPart:
    """A run of documents of the corpus, as a CorpusStage sees it once their keys are written.

    The documents of all parts are numbered in order: this part's are `first` to `first + rows - 1`. `keys` is the
    folder that `write_keys` filled, `records` the Arrow file with the documents, or None for those of an earlier
    corpus, of which only the keys are left. `removed` is a .npy file, bool [rows], of documents that an earlier
    stage removed and that count no more, or None where there are none.
    """

    keys: Path
    records: Path | None
    first: int
    rows: int
    removed: Path | None = None

    def removed_rows(self) -> BoolArray:
        """Which documents an earlier stage removed: bool [rows]."""
        return np.zeros(self.rows, np.bool_) if self.removed is None else np.load(self.removed)


def group_by_part(parts: Sequence[NumberedPart], documents: Int64Array) -> list[tuple[NumberedPart, Int64Array]]:
    """The parts that any of the documents belong to, with the indices of those documents."""
    owners = np.searchsorted([part.first + part.rows for part in parts], documents, side="right")
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(len(parts) + 1))
    return [(part, order[edges[i] : edges[i + 1]]) for i, part in enumerate(parts) if edges[i] < edges[i + 1]]


@dataclass(frozen=True)
class Task:
    """Independent work on the keys: calls `method` of the stage with a path and `arguments`, which pickle."""

    method: str
    arguments: tuple[Any, ...]

    def run(self, stage: GlobalStage, file: Path) -> None:
        """Runs the task, which writes `file` (.npy)."""
        getattr(stage, self.method)(file, *self.arguments)


class GlobalStage(ABC):
    """A stage that judges a document by all the others, in steps of bounded memory.

    1. `write_keys`, for each part: what has to be known of its documents. Pure.
    2. `match_tasks`: independent tasks over the keys of all parts, each writing one file.
    3. `refine_tasks`: perhaps more of them, made from the files of the first.
    4. `resolve`, once: writes the decisions for all documents.
    5. `apply`, for each part: carries them out. Pure.

    Every file depends on the documents and their order alone, not on how they were cut into tasks.
    """

    name: ClassVar[str]

    @abstractmethod
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        """Writes the keys of a part's documents (`RECORDS`) into an empty folder."""

    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:  # noqa: ARG002
        """Tasks none of which needs more than `memory` bytes, where that is possible at all."""
        return []

    def refine_tasks(self, parts: Sequence[NumberedPart], memory: int, matches: Sequence[Path]) -> list[Task]:  # noqa: ARG002
        """Tasks made from the files of the match tasks, in their order; often none."""
        return []

    def run_tasks(
        self, parts: Sequence[NumberedPart], memory: int, execute: Callable[[str, Sequence[Task]], list[Path]]
    ) -> tuple[list[Path], list[Path]]:
        """Runs the match tasks, then the refine tasks, and returns the files of both for `resolve`.

        `execute(kind, tasks)` runs tasks, in any order, and returns their files in the tasks' order; `kind` is
        `matching` or `comparing`.
        """
        matches = execute("matching", self.match_tasks(parts, memory))
        return matches, execute("comparing", self.refine_tasks(parts, memory, matches))

    @abstractmethod
    def resolve(
        self, parts: Sequence[NumberedPart], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        """Writes the decisions into an empty folder. Returns figures for the report, as JSON."""

    @abstractmethod
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        """Carries out the decisions in `folder` for a batch of the `documents` with these numbers, ascending.

        Documents that an earlier stage removed are missing from it. `ids_of` gives the ids of any documents.
        """

    @abstractmethod
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        """Which of all documents the decisions in `folder` remove."""

    @property
    def changes_texts(self) -> bool:
        """Whether `apply` shortens texts, so that the next stage must not judge by those that were before."""
        return False

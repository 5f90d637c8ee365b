"""The interface of a pipeline stage: a pure function from a batch to kept documents, and dropped ones with reasons.

A `Stage` sees one document at a time; a `GlobalStage` compares each document with the whole corpus.
"""

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

# `figures` is a JSON object, such as {"found": 0.31, "limit": 0.2}; `trigger` is the text that caused the drop.
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
    """Why a stage drops the document in `row` of a batch.

    `reason` is a short code such as "too_few_words", `figures` holds the measured value and its limit, and
    `trigger` is the text that caused the drop.
    """

    row: int
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    trigger: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a stage for one batch.

    `kept` holds the documents that the stage keeps, in the order of the batch and possibly with changed texts;
    `kept_rows`, bool [rows of the batch], marks them. `dropped` (`DROPPED`) holds the others, in order. `observed`
    maps a name to one value for each row of the batch, kept or not, such as a score or a language; the report draws
    its histogram. `copies`, int64 [kept rows], is how many times each kept document is written, or None for once.
    """

    kept: pa.RecordBatch
    kept_rows: BoolArray
    dropped: pa.RecordBatch
    observed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    copies: Int64Array | None = None


def outcome(
    stage: str,
    batch: pa.RecordBatch,
    drops: Sequence[Drop],
    observed: Mapping[str, Sequence[Any]] | None = None,
) -> Outcome:
    """Builds the outcome of dropping rows of `batch`, which already holds the new texts and columns."""
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
    """The documents that a stage kept.

    `documents` have the type of the caller's documents; Arrow data comes back as a table. `ids` are the ids of the
    kept documents, or their positions from 0 if they have none. `stats` counts `documents`, `kept`, `dropped`, and
    the dropped documents by `reasons`.
    """

    documents: list[AnyDocument] | pa.Table
    ids: list[str | int]
    stats: dict[str, Any]


class Stage(ABC):
    """A stage that handles each document independently of all others.

    `apply` is a pure function: its result depends neither on earlier batches nor on their order.
    """

    name: ClassVar[str]

    @abstractmethod
    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Filters or changes a batch of `RECORDS`. Must not raise for any text."""

    def filter(self, documents: Documents) -> Filtered:
        """Applies the stage to a list, an iterator or an Arrow table of documents, without a pipeline.

        A document is a text, a `Document`, or a mapping with `text`. Raises DataError for anything else.
        """
        collected = FilteredBuilder()
        for given in convert_documents(documents):
            collected.add(given, self.apply(given.records))
        return collected.result()


class FilteredBuilder:
    """Builds a `Filtered` from the kept documents of one batch after the other."""

    def __init__(self) -> None:
        self._documents: list[AnyDocument] = []
        self._batches: list[pa.RecordBatch] = []
        self._ids: list[str | int] = []
        self._reasons: Counter[str] = Counter()
        self._total = 0

    def add(self, given: ConvertedBatch, result: Outcome) -> None:
        """Adds the documents of a batch that a stage kept, and counts the reasons of those that it dropped."""
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
        """The kept documents of all batches."""
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
    """A part of the corpus whose keys are written, with the numbers of its documents.

    Documents are numbered across all parts: this part holds the documents `first` to `first + rows - 1`. `keys` is
    the folder that `write_keys` filled. `records` is the Arrow file with the documents; it is None for a part of a
    previous run, which left only its keys. `removed` is a .npy file, bool [rows], that marks the documents which a
    preceding stage removed, or None if it removed none.
    """

    keys: Path
    records: Path | None
    first: int
    rows: int
    removed: Path | None = None

    def removed_rows(self) -> BoolArray:
        """Marks the documents that a preceding stage removed: bool [rows]."""
        return np.zeros(self.rows, np.bool_) if self.removed is None else np.load(self.removed)


def group_by_part(parts: Sequence[NumberedPart], documents: Int64Array) -> list[tuple[NumberedPart, Int64Array]]:
    """Groups documents by part: each part that holds any of them, with their indices in `documents`."""
    owners = np.searchsorted([part.first + part.rows for part in parts], documents, side="right")
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(len(parts) + 1))
    return [(part, order[edges[i] : edges[i + 1]]) for i, part in enumerate(parts) if edges[i] < edges[i + 1]]


@dataclass(frozen=True)
class Task:
    """An independent computation on keys: the stage's `method`, called with an output path and `arguments`."""

    method: str
    arguments: tuple[Any, ...]

    def run(self, stage: GlobalStage, file: Path) -> None:
        """Runs the task, which writes `file` (.npy)."""
        getattr(stage, self.method)(file, *self.arguments)


class GlobalStage(ABC):
    """A stage that compares each document with the whole corpus, such as deduplication.

    It runs in steps, each in a bounded amount of memory:

    1. `write_keys` writes the keys of one part; the next steps know its documents by these keys alone. Pure.
    2. `match_tasks` lists independent tasks over the keys of all parts; each task writes one file.
    3. `refine_tasks` may list more tasks, made from the files of the match tasks.
    4. `resolve` runs once and writes the decisions about all documents.
    5. `apply` applies the decisions to one part. Pure.

    Every file depends only on the documents and their order, not on how the work was split into tasks.
    """

    name: ClassVar[str]

    @abstractmethod
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        """Writes the keys of a part's documents (`RECORDS`) into an empty folder."""

    def match_tasks(self, parts: Sequence[NumberedPart], memory: int) -> list[Task]:  # noqa: ARG002
        """Lists the match tasks; none needs more than `memory` bytes, if the stage can split them that far."""
        return []

    def refine_tasks(self, parts: Sequence[NumberedPart], memory: int, matches: Sequence[Path]) -> list[Task]:  # noqa: ARG002
        """Lists the refine tasks, given the files of the match tasks in the order of the tasks."""
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
        """Writes the decisions into the empty folder `folder`. Returns figures for the report, as JSON."""

    @abstractmethod
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        """Applies the decisions in `folder` to a batch.

        `documents`, int64 [rows], are the ascending numbers of its documents; those that a preceding stage removed
        are missing. `ids_of` returns the ids of documents by their numbers.
        """

    @abstractmethod
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        """Marks the documents of all parts that the decisions in `folder` remove: bool [documents]."""

    @property
    def changes_texts(self) -> bool:
        """Whether `apply` shortens texts. The next global stage then needs keys of the shortened texts."""
        return False

"""Runs the global stages between two passes: they compare the documents of all parts and decide which to drop."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.pipeline.executors import Executor
from deepseek_v3.data.pipeline.run_folder import (
    IDS_FILE,
    KEYS_PREFIX,
    RECORDS_FILE,
    Part,
    finish_part,
    has_own_checksum,
    is_intact,
    read_part,
    read_table,
    verify_part,
    write_checksum,
)
from deepseek_v3.data.pipeline.unique_ids import UniqueIds, unique_ids
from deepseek_v3.data.stages import GlobalStage, NumberedPart, Task, group_by_part
from deepseek_v3.utils.files import atomic_folder
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay

_FIGURES_FILE = "figures.json"
_EXCERPT_CHARACTERS = 1500

_log = get_logger("Preprocess")


@dataclass(frozen=True)
class StageDecisions:
    """What a global stage decided about `parts`. The first `num_previous` of them belong to previous runs.

    `unique_ids` is the folder with the decisions of `UniqueIds` if that stage runs before this one in the same
    pass, because the files of the parts then still hold the ids of the input.
    """

    folder: Path
    parts: tuple[NumberedPart, ...]
    num_previous: int
    unique_ids: Path | None = None

    def own_part(self, number: int) -> NumberedPart:
        """The part of the present run with this number."""
        return self.parts[self.num_previous + number]

    def ids_of(self, documents: Int64Array) -> list[str]:
        """The ids of documents given by their numbers."""
        ids = _column(self.parts, "id", documents)
        if self.unique_ids is None:
            return ids
        first_own = sum(part.rows for part in self.parts[: self.num_previous])
        return unique_ids(self.unique_ids, documents - first_own, pa.array(ids, pa.string())).to_pylist()


def run_global_stages(
    stages: Sequence[GlobalStage],
    finished: Sequence[Part],
    previous: Sequence[Sequence[NumberedPart]],
    folders: Sequence[Path],
    executor: Executor,
    memory: int,
    progress: ProgressDisplay,
) -> tuple[StageDecisions, ...]:
    """Runs each stage in turn on the documents that the stages before it kept.

    `previous` holds, for each stage, the parts of previous runs, and `folders` the folder for its tasks' files and
    decisions. Decisions and files that exist already are not made again. The stages split their work into tasks of
    at most `memory` bytes, if they can.
    """
    decisions: list[StageDecisions] = []
    removed: list[Path | None] = [None] * len(finished)
    renamed: Path | None = None
    for stage, before, folder in zip(stages, previous, folders, strict=True):
        parts = _number_parts(stage, before, finished, removed)
        decision = StageDecisions(folder / "decisions", tuple(parts), len(before), renamed)
        if not _is_decided(decision.folder):
            _verify_parts(stage, decision, executor)
            _decide(stage, decision, executor, memory, progress)
        decisions.append(decision)
        if isinstance(stage, UniqueIds):
            renamed = decision.folder
        if stage is not stages[-1]:
            removed = _write_removed(stage, decision, removed)
    return tuple(decisions)


def read_figures(folder: Path) -> dict[str, Any]:
    """Reads the figures that a stage reported with its decisions in `folder`. Raises DataError if they changed."""
    verify_part(folder / "decisions", [_FIGURES_FILE])
    figures: dict[str, Any] = orjson.loads((folder / "decisions" / _FIGURES_FILE).read_bytes())
    return figures


def _is_decided(folder: Path) -> bool:
    """Whether a stage has decided; removes decisions that changed since then, which are made again."""
    part = read_part(folder)
    if part is not None and is_intact(part):
        return True
    if folder.is_dir():
        _log.warning("%s: the decisions are damaged and are made again", folder)
        shutil.rmtree(folder)
    return False


def _verify_parts(stage: GlobalStage, decision: StageDecisions, executor: Executor) -> None:
    """Checks the documents and keys that a stage will read. Raises DataError if any changed."""
    tasks: list[tuple[Path, list[str]]] = []
    for part in decision.parts:
        if part.records is not None:
            tasks.append((part.records.parent, [RECORDS_FILE, f"{KEYS_PREFIX}{stage.name}/"]))
        elif read_part(part.keys) is not None:  # former versions left no checksums of the keys that they kept
            tasks.append((part.keys, [""]))
    executor.run(verify_part, tasks, lambda _: None)


def _number_parts(
    stage: GlobalStage, before: Sequence[NumberedPart], finished: Sequence[Part], removed: Sequence[Path | None]
) -> list[NumberedPart]:
    parts = list(before)
    first = sum(part.rows for part in before)
    for done, mask in zip(finished, removed, strict=True):
        keys, records = done.folder / "keys" / stage.name, done.folder / RECORDS_FILE
        parts.append(NumberedPart(keys, records, first, done.rows, mask))
        first += done.rows
    return parts


def _decide(
    stage: GlobalStage, decision: StageDecisions, executor: Executor, memory: int, progress: ProgressDisplay
) -> None:
    folder, parts = decision.folder.parent, decision.parts
    folder.mkdir(parents=True, exist_ok=True)

    def execute(kind: str, tasks: Sequence[Task]) -> list[Path]:
        return _run(stage, tasks, folder, kind, executor, progress)

    matches, refined = stage.run_tasks(parts, memory, execute)
    with atomic_folder(decision.folder, keep_existing=True) as partial:
        figures = stage.resolve(parts, matches, refined, partial)
        for example in figures.get("examples", []):
            example["documents"] = _excerpts(decision, [example.pop("kept"), example.pop("duplicate")])
        (partial / _FIGURES_FILE).write_bytes(orjson.dumps(figures, option=orjson.OPT_SORT_KEYS))
        finish_part(decision.folder, partial, sum(part.rows for part in parts), 0, None)


def _run(
    stage: GlobalStage,
    tasks: Sequence[Task],
    folder: Path,
    kind: str,
    executor: Executor,
    progress: ProgressDisplay,
) -> list[Path]:
    """Runs the tasks whose files do not exist yet or are damaged. Returns the files of all tasks, in order."""
    files = [folder / f"{kind}-{number:06d}.npy" for number in range(len(tasks))]
    missing = [(stage, task, file) for task, file in zip(tasks, files, strict=True) if not has_own_checksum(file)]
    with progress.task(f"{stage.name}: {kind}", len(missing), "tasks", _log) as progress_task:
        executor.run(run_task, missing, lambda _: progress_task.advance(1))
    return files


def run_task(stage: GlobalStage, task: Task, file: Path) -> None:
    """Runs one task of a stage and renames its file into place once it is complete."""
    partial = file.with_name(f".{uuid.uuid4().hex}.npy")
    try:
        task.run(stage, partial)
        write_checksum(file, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_removed(
    stage: GlobalStage, decision: StageDecisions, before: Sequence[Path | None]
) -> list[Path | None]:
    """Writes a mask for each part of this run: the documents that this stage or one before it removed."""
    all_removed = stage.removed(decision.parts, decision.folder)
    masks = decision.folder.parent / "removed"
    masks.mkdir(exist_ok=True)
    files: list[Path | None] = []
    for number, mask_before in enumerate(before):
        part = decision.own_part(number)
        mask = all_removed[part.first : part.first + part.rows]
        file = masks / f"{number:06d}.npy"
        np.save(file, mask if mask_before is None else mask | np.load(mask_before))
        files.append(file)
    return files


def _excerpts(decision: StageDecisions, documents: Sequence[int]) -> list[dict[str, Any]]:
    """Id and beginning of the text of each document for the report; text of None for documents of previous runs."""
    numbers = np.array(documents, np.int64)
    known = np.zeros(len(numbers), np.bool_)
    for part, chosen in group_by_part(decision.parts, numbers):
        known[chosen] = part.records is not None
    texts = iter(_column(decision.parts, "text", numbers[known]))
    return [
        {"id": id_, "text": next(texts)[:_EXCERPT_CHARACTERS] if has_text else None}
        for id_, has_text in zip(decision.ids_of(numbers), known, strict=True)
    ]


def _column(parts: Sequence[NumberedPart], name: str, documents: Int64Array) -> list[str]:
    """The values of a column for documents given by their numbers."""
    values = np.empty(len(documents), object)
    for part, chosen in group_by_part(parts, documents):
        column = read_table(part.records or part.keys / IDS_FILE).column(name)
        values[chosen] = column.take(pa.array(documents[chosen] - part.first)).to_pylist()
    return values.tolist()

"""Runs a global stage over documents in parts; the results must not depend on how the documents are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepseek_v3.data.stages import GlobalStage, NumberedPart, Task
from helpers.documents import batch_of

ENOUGH = 2**28


@dataclass(frozen=True)
class Run:
    """The decisions of a stage: figures, and by document the kept texts and the drops."""

    figures: dict[str, Any]
    kept: dict[int, str]
    dropped: dict[int, dict[str, Any]]
    removed: list[int]
    files: dict[str, bytes]


def write_parts(stage: GlobalStage, texts: Sequence[str], cuts: Sequence[int], folder: Path) -> list[NumberedPart]:
    """Writes the parts of the documents, which start at 0 and at each of the `cuts`."""
    edges = [0, *sorted(cuts), len(texts)]
    parts = []
    for number, (first, end) in enumerate(pairwise(edges)):
        part = NumberedPart(folder / f"keys{number}", folder / f"{number}.arrow", first, end - first)
        part.keys.mkdir(parents=True)
        table = pa.Table.from_batches([batch_of(texts[first:end], first)])
        with pa.OSFile(str(part.records), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        stage.write_keys(table, part.keys)
        parts.append(part)
    return parts


def mark_removed(parts: Sequence[NumberedPart], removed: Sequence[int], folder: Path) -> list[NumberedPart]:
    """Returns the parts with masks of the documents that a previous stage removed."""
    masked = []
    for number, part in enumerate(parts):
        mask = np.isin(np.arange(part.first, part.first + part.rows), removed)
        np.save(folder / f"removed{number}.npy", mask)
        masked.append(replace(part, removed=folder / f"removed{number}.npy"))
    return masked


def decide(
    stage: GlobalStage, parts: Sequence[NumberedPart], texts: Sequence[str], folder: Path, memory: int = ENOUGH
) -> Run:
    """Runs a stage from `match_tasks` on, and applies its decisions to the documents in batches of 5."""
    folder.mkdir(parents=True)

    def execute(kind: str, tasks: Sequence[Task]) -> list[Path]:
        files = [folder / f"{kind}-{number}.npy" for number in range(len(tasks))]
        for task, file in reversed(list(zip(tasks, files, strict=True))):  # the order must not matter
            task.run(stage, file)
        return files

    matches, refined = stage.run_tasks(parts, memory, execute)
    decisions = folder / "decisions"
    decisions.mkdir()
    figures = stage.resolve(parts, matches, refined, decisions)
    kept: dict[int, str] = {}
    dropped: dict[int, dict[str, Any]] = {}
    for first in range(0, len(texts), 5):
        some = texts[first : first + 5]
        numbers = np.arange(first, first + len(some))
        result = stage.apply(batch_of(some, first), numbers, decisions, lambda ns: [f"d{n}" for n in ns.tolist()])
        kept |= dict(zip(numbers[result.kept_rows].tolist(), result.kept.column("text").to_pylist(), strict=True))
        dropped |= dict(zip(numbers[~result.kept_rows].tolist(), result.dropped.to_pylist(), strict=True))
    removed = np.flatnonzero(stage.removed(parts, decisions)).tolist()
    files = {path.name: path.read_bytes() for path in sorted(decisions.iterdir())}
    return Run(figures, kept, dropped, removed, files)

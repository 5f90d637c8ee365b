"""What a run has left in its folder: metrics, events and config, and the figures that follow from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.monitoring import read_metrics

_RECENT = 20  # records from which the speed is taken

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its files show it.

    `steps` are the records of training steps and `validations` those of held-out losses, in the order of steps.
    `events` are those of events.jsonl; empty if there is none. `config` is None if config.yaml cannot be used.
    """

    name: str
    folder: Path
    steps: Sequence[Record]
    validations: Sequence[Record]
    events: Sequence[Record]
    config: RunConfig | None

    @property
    def last(self) -> Record:
        """The record of the last logged step."""
        return self.steps[-1]

    def values(self, name: str) -> list[float]:
        """A metric of every logged step; NaN where it is missing or not finite."""
        return [_number(record.get(name)) for record in self.steps]

    def layers(self, name: str) -> list[list[float]]:
        """A metric with one value per MoE layer, of every logged step; an empty list where it is missing."""
        found = (record.get(name) for record in self.steps)
        return [[_number(value) for value in each] if isinstance(each, list) else [] for each in found]

    def has(self, name: str) -> bool:
        """Whether any logged step has this metric."""
        return any(name in record for record in self.steps)

    def tokens_at(self, step: int) -> float:
        """The tokens trained on after a step, between those of the logged steps around it; NaN beyond them."""
        points = [(0, 0.0), *((record["step"], _number(record.get("tokens"))) for record in self.steps)]
        for (before, fewer), (after, more) in pairwise(points):
            if before <= step <= after:
                return fewer + (more - fewer) * (step - before) / max(after - before, 1)
        return math.nan

    def count(self, event: str) -> int:
        """The steps at which this event happened."""
        return len({record["step"] for record in self.events if record["event"] == event})

    @property
    def restarts(self) -> int:
        """How often the run was started after its first step."""
        return sum(record["event"] == "start" and record["step"] > 0 for record in self.events)

    @property
    def anomalies(self) -> Counter[str]:
        """The steps with an anomaly, by its kind; a step that was trained again counts once."""
        return self._kinds("anomaly")

    @property
    def alarms(self) -> Counter[str]:
        """The steps with an alarm, by its kind; a step that was trained again counts once."""
        return self._kinds("alarm")

    def _kinds(self, event: str) -> Counter[str]:
        found = {(each["step"], str(each.get("kind"))) for each in self.events if each["event"] == event}
        return Counter(kind for _, kind in found)

    @property
    def budget(self) -> int | None:
        """The tokens that the run is to train on."""
        return None if self.config is None else TrainingSchedule(self.config).total_tokens

    @property
    def tokens(self) -> float:
        """The tokens trained on so far."""
        return _number(self.last.get("tokens"))

    @property
    def tokens_per_second(self) -> float:
        """The median of the last reports."""
        recent = [each for each in self.values("tokens_per_second")[-_RECENT:] if math.isfinite(each)]
        return median(recent) if recent else math.nan

    @property
    def updated(self) -> datetime | None:
        """The moment of the last report; None for runs that did not log it."""
        seconds = self.last.get("time")
        return datetime.fromtimestamp(seconds, timezone.utc) if isinstance(seconds, (int, float)) else None

    @property
    def is_finished(self) -> bool:
        """Whether the token budget is used up."""
        return self.budget is not None and self.tokens >= self.budget

    @property
    def expected_end(self) -> datetime | None:
        """When the budget would be used up at the present speed, counted from the last report; its own if it is."""
        if self.updated is None or self.budget is None or not self.tokens_per_second > 0:
            return None
        return self.updated + timedelta(seconds=max(0.0, self.budget - self.tokens) / self.tokens_per_second)


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs from their folders, or from their metrics.jsonl; runs of the same name are called by their path.

    Raises DataError for a folder without metrics or without any training step.
    """
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in paths]
    short = Counter(folder.resolve().name for folder in folders)
    names = [str(folder) if short[folder.resolve().name] > 1 else folder.resolve().name for folder in folders]
    return [_open(name, folder) for name, folder in zip(names, folders, strict=True)]


def _open(name: str, folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    records = read_metrics(path)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise DataError(
            f"{path}: holds no training step yet, expected records with a loss; wait for the first log line of the "
            "run, or name the logging.directory of another run"
        )
    validations = [record for record in records if "holdout_loss" in record]
    return Run(name, folder, steps, validations, _events(folder / "events.jsonl"), _config(folder / "config.yaml"))


def _config(path: Path) -> RunConfig | None:
    try:
        return load_config(path)
    except (ConfigError, OSError):
        return None


def _events(path: Path) -> list[Record]:
    """The events of a file; lines that are none, such as one that a crash cut short, are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(record, dict)
            and isinstance(record.get("event"), str)
            and isinstance(record.get("step"), int)
        ):
            found.append(record)
    return found


def _number(value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]

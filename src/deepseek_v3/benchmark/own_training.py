"""Trains a shape's first steps as `dsv3 train` does, and says how fast they were."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from deepseek_v3.benchmark.shape_files import INTERVAL
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.memory_check import require_memory
from deepseek_v3.training.preflight import describe_device
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.logging import configure_logging
from deepseek_v3.utils.monitoring import read_metrics


@dataclass(frozen=True)
class TrainingFigures:
    """What the first steps of a system showed.

    `rates`: tokens per second of every interval but the first. `losses`: nats per token by step, None if not
    finite; `norms`: the gradient norms likewise, where the system tells them. `first_step_seconds` is the time from
    the start of the process to the end of the first step. `notes` says what a reader of the figures must know.
    """

    rates: tuple[float, ...]
    memory_bytes: float
    first_step_seconds: float
    losses: Mapping[int, float | None]
    norms: Mapping[int, float | None]
    notes: str = ""

    @property
    def tokens_per_second(self) -> float:
        """The median rate."""
        return median(self.rates)


class _EnoughError(Exception):
    """Ends a run after its last measured step."""


def train_own(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    """Trains the first steps of a run, everything on that a run has; `started` is the start by `time.time`.

    After the first step the trainer waits for the device; before any other step, a GPU still has the previous one
    to work on. The run ends before it would save anything. Raises PlanError for a run that the memory of a CPU's
    host does not hold, as the trainer does: it would take the memory of every other program. A GPU ends such a run
    by itself.
    """
    configure_logging(logging.WARNING)
    place = select_device(device)
    if place.type == "cpu":
        require_memory(config, describe_device(place))
    first_step: list[float] = []

    def step_begins(number: int) -> None:
        if number == 2:  # the report of the first step has waited for the device
            first_step.append(time.time() - started)
        if number > steps:
            raise _EnoughError

    with suppress(_EnoughError):
        Trainer(config, place, step_begins=step_begins).run()
    records = read_metrics(config.logging.directory / "metrics.jsonl")
    return _figures(records, first_step[0])


def first_loss(config: RunConfig, device: str) -> float | None:
    """The loss of a run's first step; None if it is not finite."""
    return train_own(config, 1, device, time.time()).losses[1]


def _figures(records: list[dict[str, Any]], first_step_seconds: float) -> TrainingFigures:
    rates = [record["tokens_per_second"] for record in records if record["step"] > INTERVAL]
    return TrainingFigures(
        rates=tuple(rates),
        memory_bytes=max(record["memory_bytes"] for record in records),
        first_step_seconds=first_step_seconds,
        losses={record["step"]: record["loss"] for record in records},
        norms={record["step"]: record["gradient_norm"] for record in records},
    )

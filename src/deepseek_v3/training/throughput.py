"""Measures how fast a run trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.host_copy import Moment


class Lap(NamedTuple):
    """The steps and tokens that a device trains on between two moments, and the seconds of pauses between them."""

    steps: int
    tokens: int
    start: Moment
    end: Moment
    paused: float

    def rates(self) -> tuple[float, float]:
        """Steps per second and tokens per second; `end` must have passed."""
        seconds = max(self.end.seconds_since(self.start) - self.paused, 1e-9)
        return self.steps / seconds, self.tokens / seconds


class Throughput:
    """Divides a run into laps, from report to report; time inside `paused` does not count.

    The first lap begins at `start`, after step `step_number`.
    """

    def __init__(self, schedule: TrainingSchedule, step_number: int, start: Moment) -> None:
        self._schedule, self._step_number, self._start = schedule, step_number, start
        self._paused = 0.0

    def lap(self, step_number: int, end: Moment) -> Lap:
        """Ends a lap with step `step_number`, which the device has done at `end`; the next lap begins there."""
        steps = step_number - self._step_number
        tokens = self._schedule.tokens_after(step_number) - self._schedule.tokens_after(self._step_number)
        lap = Lap(steps, tokens, self._start, end, self._paused)
        self._step_number, self._start, self._paused = step_number, end, 0.0
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the `with` block from the current lap.

        Before a block that takes long, wait for the device: otherwise the time of its last step is excluded, too.
        """
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

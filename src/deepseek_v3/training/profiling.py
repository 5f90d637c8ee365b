"""Profiles a few steps of a run: a trace for Perfetto, and a table of where the time of these steps goes."""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # public, but not said to be so
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from deepseek_v3.training.kernel_table import busy_microseconds, kernels_in, sum_kernels, sum_operators, work_tables
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import atomic_write, partial_path, remove_entry
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value, pluralize

MOST_STEPS = 20
# The first step compiles, tunes kernels and allocates; the next ones let allocators and prefetching settle, and the
# last three are timed without the profiler.
WARM_UP_STEPS, _TIMED_STEPS = 5, 3
_STEPS = re.compile(r"(\d{1,15})(?:-(\d{1,15}))?", re.ASCII)
_WINDOW = "profiled steps"

_log = get_logger("Profile")


@dataclass(frozen=True)
class ProfiledSteps:
    """The steps to profile: `count` steps from step `first` on, or after a warm-up if `first` is None."""

    count: int
    first: int | None = None

    @classmethod
    def parse(cls, text: str) -> ProfiledSteps:
        """Parses `3`, which is three steps after a warm-up, or `10-12`. Raises ConfigError for anything else."""
        match = _STEPS.fullmatch(text.strip())
        begin, end = (int(match[1]), int(match[2] or 0)) if match else (0, 0)
        steps = cls(end - begin + 1, begin) if match and match[2] else cls(begin)
        if not match or not 1 <= steps.count <= MOST_STEPS or steps.first == 0:
            raise ConfigError(
                f"--profile {format_value(text)}: expected a number of steps such as 3, or the first and the last "
                f"step such as 10-12; from 1 to {MOST_STEPS} steps, because a trace holds every kernel"
            )
        return steps

    def in_run(self, next_step: int, total_steps: int) -> range:
        """The numbers of the steps to profile in a run whose first step from now is `next_step`; may be empty.

        A run that is too short for warm-up and steps warms up for fewer steps.
        """
        first = self.first
        if first is None:
            first = min(next_step + WARM_UP_STEPS, max(next_step, total_steps - self.count + 1))
        return range(max(first, next_step), min(first + self.count - 1, total_steps) + 1)

    def __str__(self) -> str:
        return str(self.count) if self.first is None else _span(range(self.first, self.first + self.count))


class StepProfiler:
    """Profiles some of a run's steps and writes the results to `folder`; a context manager around all steps.

    With `steps` None it does nothing. A failure of the profiler or of its files is logged and ends the profile, but
    not the run. Leaving the block before the last of the steps writes what was recorded of whole steps.
    """

    def __init__(
        self, steps: ProfiledSteps | None, folder: Path, device: torch.device, next_step: int, total_steps: int
    ) -> None:
        self._folder, self._device = folder, device
        self._steps = steps.in_run(next_step, total_steps) if steps else range(0)
        if steps and not self._steps:
            where = (
                f"starts with step {next_step:,}"
                if (steps.first or 0) < next_step
                else f"has {total_steps:,} steps"
            )
            _log.warning(f"--profile {steps}: the run {where}; no step is profiled")
        elif steps:
            warm_up = pluralize(self._steps.start - next_step, "step")
            _log.info(f"Profiling {_name(self._steps)}, after {warm_up} of warm-up")
        begin = max(next_step + 1, self._steps.start - _TIMED_STEPS)
        self._timed = range(begin, self._steps.start) if self._steps else range(0)
        self._plain, self._traced = _Stopwatch(device), _Stopwatch(device)
        self._profile: profile | None = None
        self._last = next_step - 1

    def step(self, number: int) -> AbstractContextManager[None]:
        """A context around step `number`."""
        return self._observed(number) if number in self._timed or number in self._steps else nullcontext()

    @contextmanager
    def _observed(self, number: int) -> Iterator[None]:
        self._attempt(lambda: self._begin(number))
        with record_function(f"step {number}") if self._profile else nullcontext():
            yield
        self._last = number
        self._attempt(lambda: self._end(number))

    def _begin(self, number: int) -> None:
        if number == self._timed.start and self._timed:
            self._plain.start()
        if number == self._steps.start:
            self._profile = _start_profile(self._device)
            self._traced.start()

    def _end(self, number: int) -> None:
        if self._timed and number == self._timed[-1]:
            self._plain.stop()
        if self._profile is not None and number == self._steps[-1]:
            self._traced.stop()
            self._profile.stop()

    @contextmanager
    def between_steps(self, other_work: bool) -> Iterator[None]:
        """Writes the results after the last step. `other_work` inside the block counts in no table and no time."""
        if self._steps and self._last == self._steps[-1] and self._profile is not None:
            self._write(self._profile)
        running = [watch for watch in (self._plain, self._traced) if watch.is_running] if other_work else []
        for watch in running:
            self._attempt(watch.stop)
        yield
        for watch in running:
            self._attempt(watch.start)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops and writes a profile that is not complete."""
        recorded = self._profile
        if recorded is None:
            if self._steps and self._last < self._steps.start:
                _log.warning(f"The run ended before {_name(self._steps)}: nothing was profiled")
            return
        if self._last < self._steps[-1]:
            self._attempt(self._traced.stop)
            self._attempt(recorded.stop)
        if self._last < self._steps.start:
            _log.warning(f"The run ended during step {self._steps.start}: no whole step was profiled")
        elif self._profile is not None:
            self._write(recorded)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Runs an action of the profiler. If it fails, ends the profile, not the run."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 -- whatever a profiler may raise
            _log.warning(f"The profiler failed: {_reason(error)}; the run continues without it")
            recorded, self._profile = self._profile, None
            self._steps = self._timed = range(0)
            if recorded is not None:
                with suppress(Exception):
                    recorded.stop()

    def _write(self, recorded: profile) -> None:
        """Writes and logs the results of the steps that are complete."""
        planned, self._profile = self._steps, None
        done = range(planned.start, self._last + 1)
        self._steps = range(0)
        if done != planned:
            _log.warning(f"The run ended before {_name(planned)} were complete; profiled: {_name(done)}")
        trace, text = self._folder / f"trace_step_{_span(done)}.json.gz", self._folder / "kernels.txt"
        try:
            _remove_partial_files(self._folder)
            _write_trace(recorded, trace)
            report = "\n".join(self._report(recorded, done))
            with atomic_write(text) as partial:
                partial.write_text(report + "\n", encoding="utf-8")
        except Exception as error:  # noqa: BLE001 -- the run must go on
            _log.warning(f"{self._folder}: the profile cannot be written: {_reason(error)}; the run continues")
        else:
            _log.info(f"{report}\n\nTable: {text}\nTrace: {trace}, which https://ui.perfetto.dev opens")

    def _report(self, recorded: profile, done: range) -> list[str]:
        """The lines of the table: time per step, what was idle, kinds of work, and the longest kernels."""
        events = list(recorded.events() or [])
        windows = _windows(events, done)
        inside = [event for event in events if any(a <= event.time_range.start < b for a, b in windows)]
        kernels, total = kernels_in(inside), sum(end - start for start, end in windows)
        works = sum_kernels(kernels) if kernels else sum_operators(inside)
        timed = "not measured: only the first step ran before"
        if self._timed:
            timed = f"{1e3 * self._plain.seconds / len(self._timed):,.1f} ms per step ({_name(self._timed)})"
        figures = {
            "With the profiler": f"{total / 1e3 / len(done):,.1f} ms per step",
            "Without it": timed,
        }
        if kernels:
            figures["GPU idle"] = f"{1 - busy_microseconds(kernels) / total:.1%} of the time with the profiler"
            figures["Kernels"] = f"{len(kernels) / len(done):,.0f} per step"
        else:
            outside = max(0.0, 1 - sum(work.microseconds for work in works) / total)
            figures["Outside operators"] = f"{outside:.1%} of the time with the profiler: Python, waiting"
        head = f"{_name(done).capitalize()} of rank 0 on {_describe(self._device)}, torch {torch.__version__}"
        lines = [head, *(f"{name:18} {value}" for name, value in figures.items())]
        if self._device.type == "cuda" and not kernels:
            lines.append("The profiler recorded no kernel, because it has no access to CUPTI.")
        return [*lines, "", *work_tables(works, total, "kernel" if kernels else "operator")]


class _Stopwatch:
    """Adds up seconds from `start` to `stop`. Both wait for the device, so that its work falls between them.

    The trace marks each stretch from `start` to `stop`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark: record_function | None = None
        self._since = self.seconds = 0.0

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._mark is not None

    def start(self) -> None:
        self._synchronize()
        self._mark = record_function(_WINDOW)
        self._mark.__enter__()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops; does nothing unless it is running."""
        if self._mark is not None:
            self._synchronize()
            self.seconds += time.perf_counter() - self._since
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _start_profile(device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints when it starts and stops
    wanted = {ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if device.type == "cuda" else set())
    recorded = profile(activities=wanted & supported_activities())
    recorded.start()
    return recorded


def _windows(events: Sequence[FunctionEvent], done: range) -> list[tuple[float, float]]:
    """Start and end of each stretch of whole profiled steps, in microseconds of the trace."""
    marks = [event for event in events if event.is_user_annotation and event.device_type == DeviceType.CPU]
    cut = min((mark.time_range.start for mark in marks if mark.name == f"step {done.stop}"), default=math.inf)
    spans = [(mark.time_range.start, min(mark.time_range.end, cut)) for mark in marks if mark.name == _WINDOW]
    return [(start, end) for start, end in spans if start < end]


def _write_trace(recorded: profile, path: Path) -> None:
    """Writes a trace in Chrome's JSON format, compressed. Raises OSError if it cannot be written."""
    plain = partial_path(path.with_suffix(""))
    with atomic_write(path) as partial:
        try:
            recorded.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(partial, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)
                source.seek(-1, os.SEEK_END)
                if source.read() != b"}":  # the profiler does not report a full disk
                    raise OSError(errno.EIO, "was not written completely; is the disk full?", str(path))
        finally:
            plain.unlink(missing_ok=True)


def _remove_partial_files(folder: Path) -> None:
    """Removes what killed runs left; the caller holds the lock of the run's folder."""
    for entry in folder.glob(".*.partial"):
        remove_entry(entry)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _span(steps: range) -> str:
    return f"{steps.start}-{steps[-1]}"


def _name(steps: range) -> str:
    return f"step {steps.start}" if len(steps) == 1 else f"steps {steps.start} to {steps[-1]}"


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__

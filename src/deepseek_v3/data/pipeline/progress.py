"""How far a run is: bars with rate and time left on a terminal, and a line in the log for each finished step."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from deepseek_v3.utils.logging import get_console, get_logger

_log = get_logger("Preprocess")


class Progress:
    """The steps of a run, one after the other."""

    def __init__(self) -> None:
        console = get_console()
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def step(self, title: str, total: int, unit: str) -> Step:
        """A step of `total` bytes, parts or tasks, as a context."""
        return Step(self._bars, title, total, unit)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class Step:
    """One step; silent where there is nothing to do."""

    def __init__(self, bars: Bars, title: str, total: int, unit: str) -> None:
        self._bars, self._title, self._total, self._unit = bars, title, total, unit
        self._done = 0
        self._summary = ""

    def advance(self, amount: int) -> None:
        """Counts finished work."""
        self._done += amount
        rate = f"{self._amount(int(self._done / max(time.monotonic() - self._start, 1e-9)))}/s"
        self._bars.update(self._task, completed=self._done, rate=rate)

    def summarise(self, text: str) -> None:
        """Adds words to the line in the log."""
        self._summary = f"; {text}"

    def __enter__(self) -> Step:
        self._start = time.monotonic()
        self._task = self._bars.add_task(self._title, total=self._total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.remove_task(self._task)
        if error is None and self._total:
            seconds = time.monotonic() - self._start
            _log.info("%s: %s in %.1f s%s", self._title, self._amount(self._total), seconds, self._summary)

    def _amount(self, number: int) -> str:
        return f"{number / 1e6:,.1f} MB" if self._unit == "bytes" else f"{number:,} {self._unit}"

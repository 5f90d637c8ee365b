"""Progress of long work: a live display on a terminal, and one log line for each finished task everywhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from deepseek_v3.utils.logging import get_console
from deepseek_v3.utils.text import pluralize

# Window of the speed from which the time left is estimated: a step of a large model can take minutes.
_SPEED_ESTIMATE_SECONDS = 3600.0


class ProgressDisplay:
    """Live lines of progress: a title, a bar, a status, the time elapsed and the time left.

    It shares the console of the log lines, which scroll by above it, and draws nothing if output is not a
    terminal. However its `with` block ends, also by Ctrl-C, it restores the terminal and lets the exception
    through.
    """

    def __init__(self, *, transient: bool = True) -> None:
        """`transient` clears the lines at the end."""
        console = get_console()
        self._is_live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            _TimeLeftColumn(),
            console=console,
            expand=True,
            transient=transient,
            speed_estimate_period=_SPEED_ESTIMATE_SECONDS,
        )

    def line(self, title: str, total: int | None, done: int = 0) -> ProgressLine:
        """Adds a line for work of which `done` of `total` is done; `total` is None if it is not known."""
        return ProgressLine(self._bars, title, total, done)

    def task(self, title: str, total: int | None, unit: str, log: logging.Logger) -> ProgressTask:
        """Returns a task to use in a `with` block; `unit` is "bytes", which is shown as MB, or any other plural."""
        return ProgressTask(self, title, total, unit, log)

    def __enter__(self) -> ProgressDisplay:
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._bars.stop()


class ProgressLine:
    """One line of a display."""

    def __init__(self, bars: Progress, title: str, total: int | None, done: int) -> None:
        self._bars = bars
        self._task = bars.add_task(title, total=total, completed=done, status="")

    def update(self, title: str, done: int, status: str) -> None:
        """Replaces the title, the amount done and the status."""
        self._bars.update(self._task, description=title, completed=done, status=status)

    def remove(self) -> None:
        """Draws the line once more, then removes it from the display."""
        self._bars.refresh()
        self._bars.remove_task(self._task)


class ProgressTask:
    """Work with a rate: a line on the display while it runs, and a log line when it has succeeded.

    A task whose total is 0 writes no log line.
    """

    def __init__(
        self, display: ProgressDisplay, title: str, total: int | None, unit: str, log: logging.Logger
    ) -> None:
        self._display, self._title, self._total, self._unit, self._log = display, title, total, unit, log
        self._done = self._documents = 0

    def advance(self, amount: int, documents: int = 0) -> None:
        """Counts finished work, and the documents in it."""
        self._done += amount
        self._documents += documents
        if self._total is None:
            self._line.update(f"{self._title}: {self._amount()}", self._done, self._rate())
        else:
            percent = self._done / max(self._total, 1)
            self._line.update(self._title, self._done, f"{percent:4.0%} {self._rate()}")

    def __enter__(self) -> ProgressTask:
        self._start = time.monotonic()
        self._line = self._display.line(self._title, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.remove()
        if error is None and self._total != 0:
            self._log.info("%s: %s in %.1f s, %s", self._title, self._amount(), self._seconds(), self._rate())

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _amount(self) -> str:
        documents = f"{pluralize(self._documents, 'document')}, " if self._documents else ""
        return documents + self._quantity(self._done)

    def _rate(self) -> str:
        return f"{self._quantity(int(self._done / self._seconds()))}/s"

    def _quantity(self, number: int) -> str:
        return f"{number / 1e6:,.1f} MB" if self._unit == "bytes" else f"{number:,} {self._unit}"


class _TimeLeftColumn(TimeRemainingColumn):
    """`0:05:00 left`; nothing for a task without a total."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text.assemble(super().render(task), " left")

"""Prints log lines `[Component] message` above a live progress display on the same terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

from deepseek_v3.utils.redaction import redact

_PROJECT = "deepseek_v3"


def get_logger(component: str) -> logging.Logger:
    """The logger whose lines begin with `[component]`."""
    return logging.getLogger(f"{_PROJECT}.{component}")


def configure_logging(level: int = logging.INFO, *, stderr: bool = False) -> None:
    """Prints the project's log records from `level` up, to standard output or to standard error.

    A program calls it once, at its start; a later call replaces the previous setting.
    """
    project = logging.getLogger(_PROJECT)
    for handler in _console_handlers():
        project.removeHandler(handler)
    project.addHandler(_ConsoleHandler(_console(stderr=stderr)))
    project.setLevel(level)


def get_console() -> Console:
    """The console of the log lines, which a live display must share; a new console before `configure_logging`."""
    return next((handler.console for handler in _console_handlers()), None) or _console()


def _console_handlers() -> list[_ConsoleHandler]:
    return [handler for handler in logging.getLogger(_PROJECT).handlers if isinstance(handler, _ConsoleHandler)]


def _console(*, stderr: bool = False) -> Console:
    return Console(file=cast(IO[str], _Output(stderr)), stderr=stderr)


class _Output:
    """The current standard output or error. A write that fails is dropped and does not end the run.

    The first failure is reported once on standard error, and so is the recovery.
    """

    def __init__(self, stderr: bool) -> None:
        self._name = "stderr" if stderr else "stdout"
        self._is_failing = self._holds_text = False

    def write(self, text: str) -> int:
        stream = self._stream()
        if stream is not None and not stream.closed:
            self._holds_text = self._succeeds(lambda: stream.write(text))
        return len(text)

    def flush(self) -> None:
        stream = self._stream()
        if stream is not None and not stream.closed:
            arrives = self._succeeds(stream.flush) and self._holds_text
            self._holds_text = False
            if arrives and self._is_failing:
                self._is_failing = False
                self._report("can be written again")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def _stream(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # rich replaces the stream during a live display

    def _succeeds(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except OSError as error:
            if not self._is_failing:
                self._report(f"cannot be written: {error.strerror}; the program continues")
            self._is_failing = True
            return False
        return True

    def _report(self, what: str) -> None:
        if self._name == "stdout" and sys.stderr is not None:
            with suppress(OSError, ValueError):
                print(f"[Logging] warning: standard output {what}", file=sys.stderr, flush=True)


class _LineFormatter(logging.Formatter):
    """`[Component] message`, and `[Component] warning: message` from warnings up; further lines are indented.

    Secrets in addresses are redacted.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        component = record.name.removeprefix(f"{_PROJECT}.")
        severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        start = f"[{component}] "
        return f"{start}{severity}{redact(record.message)}".replace("\n", "\n" + " " * len(start))


class _ConsoleHandler(logging.Handler):
    """Prints through a rich console, which redraws a live display below each line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(_LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # soft_wrap leaves long lines whole; without markup, `[Trainer]` is text and not a style.
            self.console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)
        except Exception:  # noqa: BLE001 -- as in the logging module's handlers, a failed line must not end the run
            self.handleError(record)

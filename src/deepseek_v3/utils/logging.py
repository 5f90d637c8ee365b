"""Log lines `[Component] message`, printed so that a live progress display on the same terminal stays whole."""

from __future__ import annotations

import logging

from rich.console import Console

_PROJECT = "deepseek_v3"


def get_logger(component: str) -> logging.Logger:
    """The logger whose lines begin with `[component]`."""
    return logging.getLogger(f"{_PROJECT}.{component}")


def configure_logging(level: int = logging.INFO, *, stderr: bool = False) -> None:
    """Prints the project's log records from `level` up, to standard output or to standard error.

    For a program to call once as it starts; a further call replaces the earlier choice.
    """
    project = logging.getLogger(_PROJECT)
    for handler in _console_handlers():
        project.removeHandler(handler)
    project.addHandler(_ConsoleHandler(Console(stderr=stderr)))
    project.setLevel(level)


def get_console() -> Console:
    """The console of the log lines, for a live display to share; before `configure_logging` a new one."""
    return next((handler.console for handler in _console_handlers()), None) or Console()


def _console_handlers() -> list[_ConsoleHandler]:
    return [handler for handler in logging.getLogger(_PROJECT).handlers if isinstance(handler, _ConsoleHandler)]


class _LineFormatter(logging.Formatter):
    """`[Component] message`, and `[Component] warning: message` from warnings up."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        component = record.name.removeprefix(f"{_PROJECT}.")
        severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[{component}] {severity}{record.message}"


class _ConsoleHandler(logging.Handler):
    """Prints through a rich console, which draws a live display anew below each line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(_LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # soft_wrap leaves long lines whole; without markup, `[Trainer]` is text and not a style.
            self.console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)
        except Exception:  # noqa: BLE001 -- as in the logging module's handlers, a failed line ends no run
            self.handleError(record)

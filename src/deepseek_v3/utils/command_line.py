"""Running a command line so that a user's mistake ends in one clear line, and a signal in none.

FOLDED: The last words of a command: what to type next, with the files and options of this one.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

import typer

from deepseek_v3.utils.errors import UserError, error_chain, translate_os_errors
from deepseek_v3.utils.interrupts import EXIT_INTERRUPTED
from deepseek_v3.utils.numbers import MAX_COUNT, parse_count, parse_number
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import format_value, printable


def run_app(app: Callable[[], Any]) -> None:
    """Runs a command-line app; a UserError is printed to standard error without a traceback, exit code 1.

    Ctrl-C where nothing handles it exits with 130, as shells expect, also where the KeyboardInterrupt became
    another error on its way up, and where it is pressed again while the process cleans up. A signal that comes
    when the command has done its work changes nothing, nor does output that nobody reads any more.
    """
    sys.excepthook = _show_traceback
    try:
        with translate_os_errors():
            app()
    except BaseException as error:
        # Typer makes an exit of it, torch's archive writer a RuntimeError.
        if any(isinstance(cause, KeyboardInterrupt) for cause in error_chain(error)):
            _keep_exit_code(EXIT_INTERRUPTED)
            sys.exit(EXIT_INTERRUPTED)
        if isinstance(error, UserError):
            with suppress(OSError):
                print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, SystemExit) and not error.code:
            _keep_exit_code(0)
        raise
    finally:
        _flush_output()


def _keep_exit_code(code: int) -> None:
    """Lets signals that come while the interpreter ends only hasten that end."""
    _flush_output()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(code))
        atexit.register(signal.signal, number, signal.SIG_IGN)  # the interpreter takes handlers away


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def _flush(stream: TextIO | None) -> None:
    """Flushes a stream, or drops what it holds: the interpreter would exit with 120 for it."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, without the secrets that an error's message may hold."""
    with suppress(OSError):
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def run_command(command: Callable[..., None]) -> None:
    """Runs a single typed function as a command line of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def integer_option(at_least: int = -MAX_COUNT, at_most: int = MAX_COUNT) -> Callable[[Any], int]:
    """The parser of a command line's whole number, written as `parse_count` reads it within these limits."""

    def parse(value: Any) -> int:
        number = _read(value, parse_count)
        if not at_least <= number <= at_most:
            raise typer.BadParameter(f"{value}: expected a whole number from {at_least:,} to {at_most:,}")
        return number

    return parse


def number_option(value: Any) -> float:
    """The parser of a command line's number, written as `parse_number` reads it."""
    return float(_read(value, parse_number))


def _read(value: Any, parse: Callable[[str], Any]) -> Any:
    """What the text means; a default is already a number."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ValueError as error:
        raise typer.BadParameter(f"{format_value(value)}: {error}") from None


Words = Sequence[object]


def print_next_steps(*commands: Words, err: bool = False) -> None:
    """Prints commands, each a sequence of words, ready to be copied into a shell.

    To standard output, or with `err` to standard error where standard output belongs to the result alone.
    """
    lines = [f"  {redact(shlex.join(map(str, words)))}" for words in commands]
    with suppress(OSError):  # nobody reads; what the command was for is done
        typer.echo(printable("\n".join(["Next:", *lines])), err=err)


def override_options(overrides: Iterable[str] | None) -> list[str]:
    """The words that repeat overrides: `--set section.field=value` for each."""
    return [word for override in overrides or () for word in ("--set", override)]

"""Functions that all commands share: error reports, exit on signals, number options, suggested next commands."""

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
from deepseek_v3.utils.interrupts import EXIT_INTERRUPTED, STOP_SIGNALS, limit_time_to_exit
from deepseek_v3.utils.numbers import MAX_COUNT, parse_count, parse_number
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import format_value, printable


def run_app(app: Callable[[], Any]) -> None:
    """Runs a command-line app; prints a UserError as one line to standard error and exits with code 1.

    Ctrl-C that nothing handles exits with 130, as shells expect, even if a library turned the KeyboardInterrupt
    into another error, and if it is pressed again during cleanup. A signal after the command has finished does not
    change the exit code, and neither does a closed output pipe. Exit handlers of libraries get a few seconds.
    """
    sys.excepthook = _show_traceback
    try:
        with translate_os_errors():
            app()
    except BaseException as error:
        # Typer turns a KeyboardInterrupt into an exit, torch's archive writer turns it into a RuntimeError.
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
        limit_time_to_exit(_exit_code(sys.exc_info()[1]))


def _exit_code(error: BaseException | None) -> int:
    """The exit code of a program that ends with this error."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return error.code or 0
    return 0 if error is None else 1


def _keep_exit_code(code: int) -> None:
    """Makes every later stop signal end the process at once with this exit code."""
    _flush_output()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # such as SIGHUP under nohup
        signal.signal(number, lambda *_: os._exit(code))
        # While it shuts down, the interpreter replaces Python handlers by the default action, but not SIG_IGN.
        atexit.register(signal.signal, number, signal.SIG_IGN)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def _flush(stream: TextIO | None) -> None:
    """Flushes a stream, or discards its buffer: otherwise the interpreter would exit with 120."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, with the secrets in it redacted."""
    with suppress(OSError):
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def run_command(command: Callable[..., None]) -> None:
    """Runs a typed function as a command line with a single command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def integer_option(at_least: int = -MAX_COUNT, at_most: int = MAX_COUNT) -> Callable[[Any], int]:
    """Returns a parser for an option with a whole number within these limits, written as for `parse_count`."""

    def parse(value: Any) -> int:
        number = _read(value, parse_count)
        if not at_least <= number <= at_most:
            raise typer.BadParameter(f"{value}: expected a whole number from {at_least:,} to {at_most:,}")
        return number

    return parse


def number_option(value: Any) -> float:
    """Parses the number of a command-line option, written as for `parse_number`."""
    return float(_read(value, parse_number))


def _read(value: Any, parse: Callable[[str], Any]) -> Any:
    """Parses a text; returns a default value, which is a number already, as it is. Raises typer.BadParameter."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ValueError as error:
        raise typer.BadParameter(f"{format_value(value)}: {error}") from None


Words = Sequence[object]


def print_next_steps(*commands: Words, err: bool = False) -> None:
    """Prints the commands to run next, each a sequence of words, quoted for a shell.

    Prints to standard output; with `err`, prints to standard error, for a command whose standard output is its
    result.
    """
    lines = [f"  {redact(shlex.join(map(str, words)))}" for words in commands]
    with suppress(OSError):  # a closed pipe: the command itself has succeeded
        typer.echo(printable("\n".join(["Next:", *lines])), err=err)


def override_options(overrides: Iterable[str] | None) -> list[str]:
    """The command-line words that repeat these overrides: `--set section.field=value` for each."""
    return [word for override in overrides or () for word in ("--set", override)]

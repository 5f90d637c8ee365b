"""Running a command line so that a user's mistake ends in one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from deepseek_v3.utils.errors import UserError


def run_app(app: Callable[[], Any]) -> None:
    """Runs a command-line app; a UserError is printed to standard error without a traceback, exit code 1.

    Ctrl-C where nothing handles it exits with 130, as shells expect.
    """
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def run_command(command: Callable[..., None]) -> None:
    """Runs a single typed function as a command line of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)

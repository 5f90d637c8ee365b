"""The last words of a command: what to type next, with the files and options of this one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress

import typer

from deepseek_v3.utils.printing import showable
from deepseek_v3.utils.secrets import masked

Words = Sequence[object]


def say_next(*commands: Words, err: bool = False) -> None:
    """Prints commands, each a sequence of words, ready to be copied into a shell.

    To standard output, or with `err` to standard error where standard output belongs to the result alone.
    """
    lines = [f"  {masked(shlex.join(map(str, words)))}" for words in commands]
    with suppress(OSError):  # nobody reads; what the command was for is done
        typer.echo(showable("\n".join(["Next:", *lines])), err=err)


def set_options(overrides: Iterable[str] | None) -> list[str]:
    """The words that repeat overrides: `--set section.field=value` for each."""
    return [word for override in overrides or () for word in ("--set", override)]

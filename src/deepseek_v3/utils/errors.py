"""The errors that a user can cause.

A command line prints the message of any of these as one line and exits with 1; everything else is a defect of
this project and shows its traceback. A message names the file, field or tensor, what was found, what was
expected, and what to do next.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from deepseek_v3.utils.redaction import redact


class UserError(Exception):
    """Something that the person who called us can mend. Secrets in the message are masked."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class ConfigError(UserError):
    """A configuration that cannot be meant: an unknown, missing or contradictory field."""


class DataError(UserError):
    """Text, tokens or token shards that cannot be used as they are."""


class InUseError(DataError):
    """A folder that another process works in."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing, or belongs to another model."""


class GenerationError(UserError):
    """A request for text that the model cannot serve."""


class PlanError(UserError):
    """A plan that the hardware cannot hold."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose loss is no longer a number."""


class PathError(UserError):
    """A file or folder that cannot be used, of which nothing more is known than what the system says."""


# What the system says of a full disk, without naming the file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def translate_os_errors() -> Iterator[None]:
    """Turns an OSError that names a file, or a full disk, into a PathError; others are defects and stay.

    Whatever knows the option that gave the file says so itself, with an error of its own.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        place = f"{' and '.join(names)}: " if names else ""
        raise PathError(
            f"{place}cannot be used: {error.strerror}; make room, or choose another file or folder"
        ) from error


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then the one that it came from or was raised while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

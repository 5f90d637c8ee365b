"""The errors that a user can cause and mend.

The command line prints the message of such an error as one line and exits with 1. Any other exception is a defect
of this project and shows its traceback. A message names the file, field or tensor, what was found, what was
expected, and what to do next.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from deepseek_v3.utils.redaction import redact


class UserError(Exception):
    """An error that the user can mend. Secrets in the message are redacted."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class ConfigError(UserError):
    """A configuration with an unknown, missing, invalid or contradictory field."""


class DataError(UserError):
    """Text, tokens or token shards that cannot be used."""


class InUseError(DataError):
    """A folder that another process is using."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing, or belongs to another model."""


class GenerationError(UserError):
    """A request that the model cannot serve."""


class CacheFullError(GenerationError):
    """A latent cache without room for the tokens of a request; other requests may free some."""


class PlanError(UserError):
    """A plan that the hardware cannot hold."""


class TrainingError(UserError):
    """A run that cannot continue, such as one whose loss is NaN."""


class BenchmarkError(UserError):
    """A measurement that failed, or whose own check failed, so that its figures mean nothing."""


class PathError(UserError):
    """A file or folder that the operating system refuses, if no more specific error applies."""


class ResourceError(PathError):
    """Memory, disk space, descriptors or permissions that the machine does not give."""


# Errors of a full disk, and of other resources that ran out. The operating system does not name the file in them.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXHAUSTED = (*_FULL, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# Messages of libraries that give neither a MemoryError nor an error number.
_MEMORY_MESSAGE = re.compile(r"not enough memory|cannot allocate memory|can't start new thread", re.IGNORECASE)
_DISK_MESSAGE = re.compile(r"\d+ requested and \d+ written")  # NumPy
_ALLOCATION = re.compile(r"alloc of size (\d+) failed")  # Arrow


@contextmanager
def translate_os_errors() -> Iterator[None]:
    """Turns an OSError that names a file, or a full disk, into a PathError; any other OSError is a defect.

    Code that knows which option named the file raises a more specific error itself.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in _EXHAUSTED:
            raise
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        place = f"{' and '.join(names)}: " if names else ""
        raise PathError(
            f"{place}cannot be used: {error.strerror}; make room, or choose another file or folder"
        ) from error


def resource_problem(error: BaseException) -> str | None:
    """What the machine refused, if that is why an operation failed; None for any other error.

    Such an error says nothing about the data: it stops the run, which can continue once the resource is there.
    """
    for cause in error_chain(error):
        if isinstance(cause, MemoryError) or _MEMORY_MESSAGE.search(str(cause)):
            return None if _asks_for_more_than_exists(cause) else "out of memory"
        if isinstance(cause, OSError) and cause.errno in (*_EXHAUSTED, *_FORBIDDEN):
            name = f"{cause.filename}: " if cause.filename else ""
            return f"{name}{os.strerror(cause.errno)}"
        if isinstance(cause, OSError) and _DISK_MESSAGE.search(str(cause)):
            return os.strerror(errno.ENOSPC)
    return None


def _asks_for_more_than_exists(error: BaseException) -> bool:
    """Whether Arrow was to allocate more than the memory of the machine, which only damaged data demand."""
    found = _ALLOCATION.search(str(error))
    return found is not None and int(found[1]) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def translate_resource_errors(place: object, advice: str) -> Iterator[None]:
    """Turns an error of `resource_problem` into a ResourceError that begins with `place` and ends with `advice`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if problem := resource_problem(error):
            raise ResourceError(f"{place}: {problem}; {advice}") from error
        raise


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, then the error that caused it or was being handled when it was raised, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

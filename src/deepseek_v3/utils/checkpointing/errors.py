"""The error messages that every form of checkpoint shares, and the checks of a path that raise them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepseek_v3.utils.errors import CheckpointError

REPAIR = "copy it again, or load an older one"
_MAX_PROBLEMS = 8  # the most problems that one message names


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The error to raise if `path` cannot be written."""
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; "
        "make room, or choose another folder with --set checkpoint.directory=..."
    )


def read_error(path: Path, error: OSError) -> CheckpointError:
    """The error to raise if `path` is missing or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(
            f"{path}: there is no such file; give the path of a checkpoint_step_<N>.pt, "
            "or of a complete checkpoint_step_<N> folder"
        )
    return CheckpointError(
        f"{path}: cannot be read: {error.strerror}; expected a checkpoint_step_<N>.pt file, "
        "or a checkpoint_step_<N> folder"
    )


def checksum_error(path: Path, found: str, expected: str) -> CheckpointError:
    """The error to raise if a file's SHA-256 is not the one that was recorded when it was written."""
    return CheckpointError(
        f"{path}: is damaged: the SHA-256 of its bytes is {found[:12]}…, expected {expected[:12]}…; {REPAIR}"
    )


def require_regular_file(path: Path) -> int:
    """Returns the size of a file in bytes.

    Raises OSError for anything but a regular file: reading a pipe or a device might never end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return found.st_size


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises CheckpointError if the system does not say, such as without permission."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise read_error(path, error) from None


def join_problems(problems: Sequence[str]) -> str:
    """Joins problems into one line; names the first eight and counts the rest."""
    more = len(problems) - _MAX_PROBLEMS
    return "; ".join([*problems[:_MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])


def validation_problems(error: ValidationError) -> str:
    """The problems that pydantic found, each with the name of its field, in one line."""
    return join_problems([_describe(dict(problem)) for problem in error.errors()])


def _describe(problem: dict[str, Any]) -> str:
    field = ".".join(map(str, problem["loc"]))
    message = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else str(problem["msg"])
    return f"{field}: {message}" if field else message

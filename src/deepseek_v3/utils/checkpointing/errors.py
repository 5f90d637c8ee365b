"""The errors of reading and writing that every form of checkpoint shares."""

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
_MOST_LISTED = 8  # problems in one message


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What to say where the disk refuses `path`."""
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; "
        "make room, or choose another folder with --set checkpoint.directory=..."
    )


def read_error(path: Path, error: OSError) -> CheckpointError:
    """What to say where `path` is missing or cannot be read."""
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
    """What to say where the SHA-256 of a file's bytes is not the one noted when it was written."""
    return CheckpointError(
        f"{path}: is damaged: the SHA-256 of its bytes is {found[:12]}…, expected {expected[:12]}…; {REPAIR}"
    )


def require_regular_file(path: Path) -> int:
    """The size of a file in bytes; a pipe or a device, which could be read for ever, is an OSError."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return found.st_size


def is_folder(path: Path) -> bool:
    """Whether a folder lies at `path`. Raises CheckpointError where that cannot be told."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise read_error(path, error) from None


def join_problems(problems: Sequence[str]) -> str:
    """All problems as one line, the first few in words."""
    more = len(problems) - _MOST_LISTED
    return "; ".join([*problems[:_MOST_LISTED], *([f"and {more} more"] if more > 0 else [])])


def validation_problems(error: ValidationError) -> str:
    """What pydantic found, each problem with the name of its field."""
    return join_problems([_in_words(dict(problem)) for problem in error.errors()])


def _in_words(problem: dict[str, Any]) -> str:
    field = ".".join(map(str, problem["loc"]))
    message = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else str(problem["msg"])
    return f"{field}: {message}" if field else message

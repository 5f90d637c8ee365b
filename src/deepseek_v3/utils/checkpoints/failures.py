"""The errors of reading and writing that every form of checkpoint shares."""

from __future__ import annotations

from pathlib import Path

from deepseek_v3.utils.errors import CheckpointError

REPAIR = "copy it again, or load an older one"


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """What to say where the disk refuses `path`."""
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; "
        "make room, or choose another folder with --set checkpoint.directory=..."
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
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


def damaged(path: Path, found: str, expected: str) -> CheckpointError:
    """What to say where the SHA-256 of a file's bytes is not the one noted when it was written."""
    return CheckpointError(
        f"{path}: is damaged: the SHA-256 of its bytes is {found[:12]}…, expected {expected[:12]}…; {REPAIR}"
    )

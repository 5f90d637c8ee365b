"""Checkpoint folders that are complete or invisible: whatever is not, or is going away, has a hidden name.

`.checkpoint_step_<N>.partial` is being written, `.checkpoint_step_<N>.outdated` is being deleted; a program that is
killed meanwhile leaves no more than that.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from deepseek_v3.utils.files import sync_directory

_HIDDEN = re.compile(r"\.checkpoint_step_[0-9]+\.(partial|outdated)")


def partial_folder(folder: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return folder.with_name(f".{folder.name}.partial")


def publish_folder(folder: Path) -> None:
    """Gives `partial_folder(folder)`, whose files are fsynced, its name; an earlier `folder` goes away."""
    partial = partial_folder(folder)
    sync_directory(partial)
    outdated = _set_aside(folder)
    partial.rename(folder)
    sync_directory(folder.parent)
    shutil.rmtree(outdated, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if there is one, that is never seen half deleted."""
    outdated = _set_aside(folder)
    if outdated.exists():
        shutil.rmtree(outdated)


def remove_leftovers(directory: Path) -> None:
    """Deletes what killed programs left half written or half deleted among the checkpoints of a run."""
    for entry in directory.iterdir():
        if _HIDDEN.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry)


def _set_aside(folder: Path) -> Path:
    """Hides a folder that is to be deleted, if there is one, and returns its hidden path."""
    outdated = folder.with_name(f".{folder.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.is_dir():
        folder.rename(outdated)
    return outdated

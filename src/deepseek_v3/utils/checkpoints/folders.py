"""Checkpoint folders that are complete or invisible: whatever is not, or is going away, has a hidden name.

`.checkpoint_step_<N>.partial` is being written, `.checkpoint_step_<N>.outdated` is being deleted, and
`.checkpoint_step_<N>.replaced` is complete until the one that replaces it has its name. A program that is killed
meanwhile leaves no more than that, and no step is lost: `remove_leftovers` gives a replaced folder its name back
where the new one never got it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from deepseek_v3.utils.files import remove_entry, sync_directory

_HIDDEN = re.compile(
    r"\.(?P<name>checkpoint_step_[0-9]+)\.(?P<state>partial|outdated|replaced)"
    r"|\.checkpoint_step_[0-9]+\.pt\.[0-9]+\.partial"  # of a process that wrote a file
)


def partial_folder(folder: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return _hidden(folder, "partial")


def publish_folder(folder: Path) -> None:
    """Gives `partial_folder(folder)`, whose files are fsynced, its name; an earlier `folder` goes away."""
    partial, replaced = partial_folder(folder), _hidden(folder, "replaced")
    sync_directory(partial)
    if folder.is_dir():
        folder.rename(replaced)
    partial.rename(folder)
    sync_directory(folder.parent)
    if replaced.is_dir():
        _delete(replaced, folder)


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if there is one, that is never seen half deleted."""
    if folder.is_dir():
        _delete(folder, folder)


def remove_leftovers(directory: Path) -> None:
    """Tidies up what killed programs left half written, half deleted or half replaced among checkpoints.

    The caller holds the run's lock. Raises OSError where a replaced folder cannot have its name back.
    """
    left = [(entry, match) for entry in directory.iterdir() if (match := _HIDDEN.fullmatch(entry.name))]
    for entry, match in left:
        if entry.is_dir() != bool(match["state"]):
            continue  # a file under the name of a folder, or the other way round, is none of ours
        if match["state"] == "replaced" and not (folder := directory / match["name"]).exists():
            entry.rename(folder)
            sync_directory(directory)
        elif match["state"] == "replaced":
            _delete(entry, folder)
        else:
            remove_entry(entry)


def _delete(entry: Path, folder: Path) -> None:
    """Deletes the folder `entry` under the hidden name of what is being deleted of `folder`."""
    outdated = _hidden(folder, "outdated")
    remove_entry(outdated)
    entry.rename(outdated)
    shutil.rmtree(outdated)


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")

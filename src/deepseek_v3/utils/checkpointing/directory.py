"""The checkpoints of a run: finding, loading, saving and removing them, whether they are files or folders.

A single process writes the file `checkpoint_step_<N>.pt` (see `single_file`), the ranks of a job write the folder
`checkpoint_step_<N>` (see `sharded`). Both are complete or invisible and carry checksums.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from deepseek_v3.utils.checkpointing.errors import is_folder, read_error
from deepseek_v3.utils.checkpointing.index import INDEX_FILE
from deepseek_v3.utils.checkpointing.reader import FolderReader
from deepseek_v3.utils.checkpointing.single_file import load_file
from deepseek_v3.utils.checkpointing.single_file import save_file as save_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import unflatten
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.files import remove_folder
from deepseek_v3.utils.logging import get_logger

__all__ = ["CheckpointDirectory", "is_checkpoint", "load_checkpoint", "remove_checkpoint", "save_checkpoint"]

T = TypeVar("T")

_NAME = re.compile(r"checkpoint_step_(0|[1-9][0-9]*)(\.pt)?")

_log = get_logger("Checkpoint")


def load_checkpoint(path: Path, *, verify: bool = True, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint, a file or a folder, into nested dicts with tensors on `map_location`.

    Nothing is modified and no code is run. Raises CheckpointError if it is missing, damaged, or not a checkpoint.
    `verify=False` skips the checksums of one that has just been verified; damage may then go unnoticed.
    """
    if not is_folder(path):
        return load_file(path, verify=verify, map_location=map_location)
    checkpoint = FolderReader(path)
    if verify:
        checkpoint.verify()
    tensors = {name: checkpoint.read(name).to(map_location) for name in checkpoint.tensors}
    return unflatten(tensors, checkpoint.plain)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint, under any name, rather than a folder of several.

    Raises CheckpointError if the system does not say, such as without permission.
    """
    if not is_folder(path) or _NAME.fullmatch(path.name) is not None:
        return True
    try:
        return (path / INDEX_FILE).exists()
    except OSError as error:
        raise read_error(path, error) from None


@dataclass(frozen=True)
class CheckpointDirectory:
    """The checkpoints of one run in the folder `path`, one file or folder per step; the newest `keep` are kept.

    Those of multiples of `keep_every` steps are kept, too, unless it is 0. Entries with other names are never
    touched.
    """

    path: Path
    keep: int
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}, expected at least 1")

    def file_of(self, step: int) -> Path:
        """The file for the checkpoint of a step that a single process writes."""
        return self.path / f"checkpoint_step_{step}.pt"

    def folder_of(self, step: int) -> Path:
        """The folder for the checkpoint of a step that the ranks of a job write."""
        return self.path / f"checkpoint_step_{step}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Saves the checkpoint of `step` as a file, then removes the checkpoints that it makes outdated.

        Raises as `save_checkpoint` does, before anything is removed.
        """
        path = self.file_of(step)
        save_checkpoint(path, state)
        self.remove_outdated(path)
        return path

    def remove_outdated(self, complete: Path) -> None:
        """Removes what is not to be kept of the checkpoints up to the step of `complete`, and its other form.

        Checkpoints of later steps stay and do not count: a run that resumed from before a damaged checkpoint must
        not count that one among the kept. A checkpoint that cannot be removed is logged and stays.
        """
        step = _step_of(complete)
        found = self._found()
        oldest_kept = sorted({_step_of(path) for path in found if _step_of(path) <= step})[-self.keep :][0]
        older = [path for path in found if _step_of(path) < oldest_kept]
        outdated = [path for path in older if not self.keeps_for_ever(path)]
        other_form = [path for path in found if _step_of(path) == step and path.name != complete.name]
        for path in outdated + other_form:
            reach("remove")
            try:
                remove_checkpoint(path)
            except OSError as error:
                _log.warning("%s: is outdated and cannot be removed: %s; remove it by hand", path, error.strerror)

    def keeps_for_ever(self, path: Path) -> bool:
        """Whether the step of one of these checkpoints is a multiple of `keep_every`."""
        return self.keep_every > 0 and _step_of(path) % self.keep_every == 0

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending; none if the folder does not exist yet."""
        return sorted({_step_of(path) for path in self._found()})

    def newest_first(self) -> list[Path]:
        """All checkpoints, from the last step to the first."""
        return sorted(self._found(), key=_step_of, reverse=True)

    def latest(self) -> tuple[Path, dict[str, Any]]:
        """Loads the newest undamaged checkpoint, tensors on the CPU; logs a warning for each damaged one it skips.

        Raises CheckpointError if there is none.
        """
        return self.first_usable(self.newest_first(), load_checkpoint)

    def first_usable(self, paths: list[Path], use: Callable[[Path], T], *, log: bool = True) -> tuple[Path, T]:
        """Returns the first of `paths` for which `use` raises no CheckpointError, with the result of `use`.

        `log` warns of each path before it. Raises CheckpointError if there is none.
        """
        for path in paths:
            try:
                return path, use(path)
            except CheckpointError as error:
                if log:
                    _log.warning("skipped %s", error)
        found = f"none of its {len(paths)} checkpoints can be loaded" if paths else "holds no checkpoint"
        raise CheckpointError(f"{self.path}: {found}; name another folder, or start afresh")

    def refuse_if_used(self) -> None:
        """Raises CheckpointError if a new run would write among the checkpoints of a previous one."""
        steps = self.steps()
        if steps:
            raise CheckpointError(
                f"{self.path}: already holds checkpoints up to step {steps[-1]}; continue with --resume latest, "
                "or choose another folder with --set checkpoint.directory=..."
            )

    def _found(self) -> list[Path]:
        try:
            return [entry for entry in self.path.iterdir() if _has_form(entry)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read as a folder: {error.strerror}; "
                "choose another with --set checkpoint.directory=..."
            ) from error


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, if it exists, so that it is never visible half deleted."""
    remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)


def _has_form(entry: Path) -> bool:
    name = _NAME.fullmatch(entry.name)
    return name is not None and (entry.is_file() if name[2] else entry.is_dir())


def _step_of(path: Path) -> int:
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])

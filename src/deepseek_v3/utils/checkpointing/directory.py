"""The checkpoints of a run, each either a file or a folder, and what both forms have in common.

`checkpoint_step_<N>.pt` is written by one process (see `checkpoints.single_file`), the folder `checkpoint_step_<N>`
by all ranks of a job (see `checkpoints.sharded`). Either is complete or invisible and carries checksums.
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
from deepseek_v3.utils.files import remove_folder
from deepseek_v3.utils.logging import get_logger

__all__ = ["CheckpointDirectory", "is_checkpoint", "load_checkpoint", "save_checkpoint"]

T = TypeVar("T")

_NAME = re.compile(r"checkpoint_step_(0|[1-9][0-9]*)(\.pt)?")

_log = get_logger("Checkpoint")


def load_checkpoint(path: Path, *, verify: bool = True, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint into nested dicts, tensors on `map_location`: the same from a file as from a folder.

    Nothing is modified and no code is run. Raises CheckpointError where it is missing, damaged, or no checkpoint.
    `verify=False` skips the checksums, for one that has just been verified; damage may then go unnoticed.
    """
    if not is_folder(path):
        return load_file(path, verify=verify, map_location=map_location)
    contents = FolderReader(path)
    if verify:
        contents.verify()
    tensors = {name: contents.whole(name).to(map_location) for name in contents.tensors}
    return unflatten(tensors, contents.plain)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` stands for one checkpoint, under whatever name, and not for a folder of several.

    Raises CheckpointError where that cannot be told, such as for want of permission.
    """
    if not is_folder(path) or _NAME.fullmatch(path.name) is not None:
        return True
    try:
        return (path / INDEX_FILE).exists()
    except OSError as error:
        raise read_error(path, error) from None


@dataclass(frozen=True)
class CheckpointDirectory:
    """The checkpoints of one run in the folder `path`, of each step one: a file or a folder.

    Files and folders of any other name are never touched.
    """

    path: Path
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}, expected at least 1")

    def file_of(self, step: int) -> Path:
        """The file that holds the checkpoint of a step, where one process writes it."""
        return self.path / f"checkpoint_step_{step}.pt"

    def folder_of(self, step: int) -> Path:
        """The folder that holds the checkpoint of a step, where the ranks of a job write it together."""
        return self.path / f"checkpoint_step_{step}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Saves the checkpoint of `step` as a file, then removes those that it makes outdated.

        Raises as `save_checkpoint` does, in which case nothing has been removed.
        """
        path = self.file_of(step)
        save_checkpoint(path, state)
        self.remove_outdated(path)
        return path

    def remove_outdated(self, complete: Path) -> None:
        """Removes all but the newest `keep` up to the step of `complete`, and that step's other form.

        Later ones are left alone: where a run went back past a damaged checkpoint, that one must not count as one
        of those kept. What cannot be removed is logged, since the checkpoint itself is safe.
        """
        step = _step_of(complete)
        found = self._found()
        oldest_kept = sorted({_step_of(path) for path in found if _step_of(path) <= step})[-self.keep :][0]
        outdated = [path for path in found if _step_of(path) < oldest_kept]
        other_form = [path for path in found if _step_of(path) == step and path.name != complete.name]
        for path in outdated + other_form:
            try:
                remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s: is outdated and cannot be removed: %s; remove it by hand", path, error.strerror)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending; none where the folder does not exist yet."""
        return sorted({_step_of(path) for path in self._found()})

    def newest_first(self) -> list[Path]:
        """All checkpoints, from the last step to the first."""
        return sorted(self._found(), key=_step_of, reverse=True)

    def latest(self) -> tuple[Path, dict[str, Any]]:
        """The newest undamaged checkpoint, tensors on the CPU; each damaged one passed over is logged as a warning.

        Raises CheckpointError where there is none.
        """
        return self.first_usable(self.newest_first(), load_checkpoint)

    def first_usable(self, paths: list[Path], use: Callable[[Path], T], *, tell: bool = True) -> tuple[Path, T]:
        """The first of `paths` for which `use` raises no CheckpointError, and what it returns; else as `latest`."""
        for path in paths:
            try:
                return path, use(path)
            except CheckpointError as error:
                if tell:
                    _log.warning("passed over %s", error)
        found = f"none of its {len(paths)} checkpoints can be loaded" if paths else "holds no checkpoint"
        raise CheckpointError(f"{self.path}: {found}; name another folder, or start afresh")

    def refuse_if_used(self) -> None:
        """Raises CheckpointError where a fresh run would write among the checkpoints of an earlier one."""
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


def _has_form(entry: Path) -> bool:
    name = _NAME.fullmatch(entry.name)
    return name is not None and (entry.is_file() if name[2] else entry.is_dir())


def _step_of(path: Path) -> int:
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])

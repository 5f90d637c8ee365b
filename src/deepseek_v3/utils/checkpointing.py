"""Checkpoints: single files that are complete or invisible, prove that they are undamaged, and hold no code.

A checkpoint is the ZIP archive that `torch.save` writes, given the ZIP comment `sha256:<64 hex digits>`. The hash
is over every byte before the comment, which includes the comment's length in the last two bytes of the archive's
end record. Whatever reads `torch.save` archives opens it, `torch.load(..., mmap=True, weights_only=True)` too.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import sha256_of_file, written_atomically
from deepseek_v3.utils.logging import get_logger

_COMMENT_BYTES = len("sha256:") + 64
_COMMENT_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")

# The end record of a ZIP archive (APPNOTE 4.3.16): signature, 16 bytes of counts and offsets, the comment's length.
_END_RECORD_BYTES = 22
_BARE_ENDING = re.compile(rb"PK\x05\x06.{16}\0\0", re.DOTALL)
_ENDING = re.compile(rb"PK\x05\x06.{16}" + re.escape(_COMMENT_LENGTH) + rb"sha256:([0-9a-f]{64})", re.DOTALL)

_NAME = re.compile(r"checkpoint_step_(0|[1-9][0-9]*)\.pt")
_PLAIN = (torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None))

_log = get_logger("Checkpoint")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to the file `path`, which appears whole or not at all and replaces an earlier one.

    `state` holds tensors of any dtype, dicts with str or int keys, lists, tuples, str, int, float, bool and None.
    Raises TypeError, naming the entry, for anything else, and CheckpointError where the disk refuses.
    """
    _require_plain(state, "state")
    try:
        with written_atomically(path) as partial:
            with partial.open("wb") as file:
                torch.save(state, file)
            _append_checksum(partial)
    except (OSError, RuntimeError) as error:
        # torch's archive writer stumbles over its own state after a failed write; the cause is one step back.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(
            f"{path}: cannot be written: {cause.strerror}; "
            "make room, or choose another folder with --set checkpoint.directory=..."
        ) from error


def load_checkpoint(path: Path, *, verify: bool = True, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, tensors on `map_location`; the file is not modified and no code is run.

    Raises CheckpointError where the file is missing, damaged, or holds anything but tensors and plain values.
    `verify=False` skips the checksum, for a file that has just been verified; damage may then go unnoticed.
    """
    try:
        if verify:
            _verify_checksum(path)
        state = _load_plain(path, map_location)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; give the path of a checkpoint_step_<N>.pt") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; expected a checkpoint_step_<N>.pt file"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, expected a dict; load a checkpoint that this project saved"
        )
    return state


def _load_plain(path: Path, map_location: str | torch.device) -> object:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # on unexpected bytes torch.load lets nearly any type of exception through
        raise CheckpointError(
            f"{path}: is not an archive of tensors and plain values alone ({type(error).__name__}); "
            "load a checkpoint that this project saved"
        ) from error


def _require_plain(value: Any, name: str) -> None:
    """Refuses what would not load again; exact types, because subclasses are pickled by reference to their code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{name} has the key {key!r}; the keys of a checkpoint are str or int")
            _require_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{name} is a {type(value).__name__}; "
            "a checkpoint holds tensors, dicts, lists, tuples, str, int, float, bool and None"
        )


def _append_checksum(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-_END_RECORD_BYTES, os.SEEK_END)
        if not _BARE_ENDING.fullmatch(file.read()):
            raise RuntimeError(
                f"torch {torch.__version__} saved something other than a ZIP archive without comment"
            )
        file.seek(-len(_COMMENT_LENGTH), os.SEEK_END)
        file.write(_COMMENT_LENGTH)
    digest = sha256_of_file(path)
    with path.open("ab") as file:
        file.write(f"sha256:{digest}".encode())


def _verify_checksum(path: Path) -> None:
    """Raises CheckpointError unless the file ends in the SHA-256 of everything before it."""
    with path.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, num_bytes - _END_RECORD_BYTES - _COMMENT_BYTES))
        ending = _ENDING.fullmatch(file.read())
    if not ending:
        raise CheckpointError(
            f"{path}: does not end in a checksum after its {num_bytes:,} bytes, so it was cut short or is no "
            "checkpoint of this project; copy it again, or load an older one"
        )
    expected = ending[1].decode()
    found = sha256_of_file(path, num_bytes - _COMMENT_BYTES)
    if found != expected:
        raise CheckpointError(
            f"{path}: is damaged: the SHA-256 of its bytes is {found[:12]}…, expected {expected[:12]}…; "
            "copy it again, or load an older one"
        )


@dataclass(frozen=True)
class CheckpointDirectory:
    """The checkpoints of one run: files `checkpoint_step_<N>.pt` in the folder `path`.

    Files of any other name are never touched.
    """

    path: Path
    keep: int

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}, expected at least 1")

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Saves the checkpoint of `step`, then removes all but the newest `keep` up to and including it.

        Later ones are left alone: where a run went back past a damaged checkpoint, that file must not count as
        one of those kept. Raises as `save_checkpoint` does, in which case nothing has been removed.
        """
        path = self._path_of(step)
        save_checkpoint(path, state)
        reached = [other for other in self.steps() if other <= step]
        for outdated in reached[: -self.keep]:
            self._path_of(outdated).unlink(missing_ok=True)
        return path

    def steps(self) -> list[int]:
        """The steps of all checkpoints in the folder, ascending; none where the folder does not exist yet."""
        try:
            names = [_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_file()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read as a folder: {error.strerror}; "
                "choose another with --set checkpoint.directory=..."
            ) from error
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> tuple[Path, dict[str, Any]]:
        """The newest undamaged checkpoint, tensors on the CPU; each damaged one passed over is logged as a warning.

        Raises CheckpointError where there is none.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._path_of(step)
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                _log.warning("passed over %s", error)
        found = f"none of its {len(steps)} checkpoints can be loaded" if steps else "holds no checkpoint"
        raise CheckpointError(f"{self.path}: {found}; name another folder, or start afresh")

    def refuse_if_used(self) -> None:
        """Raises CheckpointError where a fresh run would write among the checkpoints of an earlier one."""
        steps = self.steps()
        if steps:
            raise CheckpointError(
                f"{self.path}: already holds checkpoints up to step {steps[-1]}; continue with --resume latest, "
                "or choose another folder with --set checkpoint.directory=..."
            )

    def _path_of(self, step: int) -> Path:
        return self.path / f"checkpoint_step_{step}.pt"

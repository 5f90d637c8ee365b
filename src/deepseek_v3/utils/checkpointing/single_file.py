"""Checkpoints of one file: complete or invisible, with a checksum, and loaded without running any code from them.

A checkpoint is the ZIP archive that `torch.save` writes, plus the ZIP comment `sha256:<64 hex digits>`. The hash
covers every byte before the comment, including the comment's length in the last two bytes of the archive's end
record. Every program that reads `torch.save` archives opens it, and so does
`torch.load(..., mmap=True, weights_only=True)`.

The archive holds a pickle. Only torch's restricted unpickler (`weights_only=True`) reads it, which builds tensors
and plain containers and calls nothing that the file names. The result passes the same checks as a state to be
saved.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.utils.checkpointing.errors import (
    REPAIR,
    checksum_error,
    read_error,
    require_regular_file,
    write_error,
)
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.files import atomic_write, sha256_of_file

_COMMENT_BYTES = len("sha256:") + 64
_COMMENT_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")

# The end record of a ZIP archive (APPNOTE 4.3.16): signature, 16 bytes of counts and offsets, the comment's length.
_END_RECORD_BYTES = 22
_BARE_ENDING = re.compile(rb"PK\x05\x06.{16}\0\0", re.DOTALL)
_ENDING = re.compile(rb"PK\x05\x06.{16}" + re.escape(_COMMENT_LENGTH) + rb"sha256:([0-9a-f]{64})", re.DOTALL)

_PLAIN = (torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None))


def save_file(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to the file `path`, which appears complete or not at all and replaces a previous one.

    `state` holds tensors of any dtype, dicts with str or int keys, lists, tuples, str, int, float, bool and None.
    Raises TypeError, naming the entry, for anything else, and CheckpointError if the file cannot be written.
    """
    _require_plain(state, "state")
    try:
        with atomic_write(path) as partial:
            with partial.open("wb") as file:
                torch.save(state, file)
            reach("save")
            _append_checksum(partial)
    except (OSError, RuntimeError) as error:
        # After a failed write torch's archive writer raises a RuntimeError, whose context is the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise write_error(path, cause) from error


def load_file(
    path: Path, *, verify: bool = True, map_location: str | torch.device = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Reads what `save_file` wrote, with tensors on `map_location`. The file is not modified and no code is run.

    Raises CheckpointError if the file is missing, damaged, or holds anything but tensors and plain values.
    `verify=False` skips the checksum of a file that has just been verified; damage may then go unnoticed. With
    `mmap`, tensors are mapped into memory: their values are read when they are used, and changes stay in memory.
    """
    try:
        if verify:
            verify_file(path)
        state = _load_plain(path, map_location, mmap)
    except OSError as error:
        raise read_error(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, expected a dict; load a checkpoint that this project saved"
        )
    try:
        _require_plain(state, "state")
    except (TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}; load a checkpoint that this project saved") from None
    return state


def verify_file(path: Path) -> None:
    """Raises CheckpointError unless the file ends in the SHA-256 of everything before it, OSError if unreadable."""
    num_bytes = require_regular_file(path)
    with path.open("rb") as file:
        file.seek(max(0, num_bytes - _END_RECORD_BYTES - _COMMENT_BYTES))
        ending = _ENDING.fullmatch(file.read())
    if not ending:
        raise CheckpointError(
            f"{path}: does not end in a checksum after its {num_bytes:,} bytes, so it was cut short or is no "
            f"checkpoint of this project; {REPAIR}"
        )
    expected = ending[1].decode()
    found = sha256_of_file(path, num_bytes - _COMMENT_BYTES)
    if found != expected:
        raise checksum_error(path, found, expected)


def _load_plain(path: Path, map_location: str | torch.device, mmap: bool) -> object:
    require_regular_file(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # on unexpected bytes torch.load raises nearly any type of exception
        raise CheckpointError(
            f"{path}: is not an archive of tensors and plain values alone ({type(error).__name__}); "
            "load a checkpoint that this project saved"
        ) from error


def _require_plain(value: Any, name: str) -> None:
    """Raises TypeError for what would not load again.

    Compares exact types, because a subclass is pickled as a reference to its code.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{name} has the key {key!r}; the keys of a checkpoint are str or int")
            _require_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_quantized or value.is_meta):
        raise TypeError(f"{name} is a sparse, quantized or meta tensor; a checkpoint holds dense tensors")
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

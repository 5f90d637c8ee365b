"""Where released tensors come from: the safetensors files of a directory, or tensors in memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.config.text_files import printable_path, read_json_object
from deepseek_v3.utils.checkpointing.checks import TensorInfo, tensor_infos
from deepseek_v3.utils.checkpointing.errors import join_problems, require_regular_file
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPES, HeaderEntry, read_header
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from deepseek_v3.utils.text import format_value

CPU = torch.device("cpu")
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX_BYTES = 2**28  # the index of the released model has 10 MB
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_REPAIR = "download or export it again"


class TensorSource(ABC):
    """Tensors by released name.

    `tensors` gives the dtype and the shape of each; `name` names the source in errors.
    """

    name: str
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, tensor: str, rows: range | None = None, device: torch.device = CPU) -> Tensor:
        """The tensor, or these consecutive rows of it, along its first axis, on `device`. Never write to it."""

    def has_values(self, tensor: str) -> bool:  # noqa: ARG002 -- a source whose tensors all have values
        """Whether the tensor has values, and not only a shape."""
        return True


class TensorDict(TensorSource):
    """Tensors in memory, on any device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.name, self.tensors, self._values = "the given weights", tensor_infos(tensors), tensors

    def read(self, tensor: str, rows: range | None = None, device: torch.device = CPU) -> Tensor:
        values = self._values[tensor]
        return (values if rows is None else values[rows.start : rows.stop]).to(device)

    def has_values(self, tensor: str) -> bool:
        return not self._values[tensor].is_meta


class TensorFolder(TensorSource):
    """The safetensors files of a directory: one `model.safetensors`, or several with an index.

    Opening reads the headers only; `read` reads the bytes of the rows that it returns, into new memory. The files
    are read, not memory-mapped: if a mapped file becomes shorter, SIGBUS kills the process without a message.

    Raises one CheckpointError for files that are missing, damaged or no safetensors, for an index that does not
    agree with them or names files outside the directory, and for a tensor that two files hold.
    """

    def __init__(self, directory: Path) -> None:
        self.name = f"{printable_path(directory)}: its weights"
        self._entries: dict[str, tuple[Path, HeaderEntry]] = {}
        index = _read_index(directory)
        files = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
        if WEIGHTS_FILE not in files and os.path.lexists(directory / WEIGHTS_FILE):
            raise CheckpointError(
                f"{printable_path(directory)}: has {WEIGHTS_FILE}, and {WEIGHTS_INDEX} of other files, expected "
                "one of them; remove the outdated weights"
            )
        problems = [problem for file in files for problem in self._open(directory / file)]
        if index is not None and not problems:
            problems += self._compare(index)
        if problems:
            raise CheckpointError(f"{printable_path(directory)}: {join_problems(problems)}; {_REPAIR}")
        self.tensors = {
            name: TensorInfo(DTYPES[entry.dtype], entry.shape) for name, (_, entry) in self._entries.items()
        }

    def _open(self, path: Path) -> list[str]:
        """Adds the tensors of a file; returns its problems."""
        try:
            require_regular_file(path)
            entries = read_header(path)
        except OSError as error:
            return [f"{format_value(path.name)} cannot be read: {error.strerror}"]
        except RecursionError:
            return [f"{format_value(path.name)} is no safetensors file: its header is nested too deeply"]
        except ValueError as error:
            return [f"{format_value(path.name)} is no safetensors file: {error}"]
        twice = [
            f"{format_value(name)} is in {self._entries[name][0].name} and in {path.name}"
            for name in sorted(entries.keys() & self._entries)
        ]
        self._entries |= {name: (path, entry) for name, entry in entries.items()}
        return twice

    def _compare(self, index: Mapping[str, str]) -> list[str]:
        index = {name: format_value(file) for name, file in index.items()}
        found = {name: format_value(path.name) for name, (path, _) in self._entries.items()}
        return [
            f"{format_value(name)} is in {found.get(name, 'no file')}, and by {WEIGHTS_INDEX} in "
            f"{index.get(name, 'none')}"
            for name in sorted(found.keys() | index.keys())
            if found.get(name) != index.get(name)
        ]

    def read(self, tensor: str, rows: range | None = None, device: torch.device = CPU) -> Tensor:
        path, entry = self._entries[tensor]
        dtype, shape, begin = DTYPES[entry.dtype], list(entry.shape), entry.begin
        if rows is not None:
            row_bytes = dtype.itemsize
            for size in shape[1:]:
                row_bytes *= size
            begin, shape[0] = begin + rows.start * row_bytes, len(rows)
        # Torch keeps pinned memory and uses it again; new memory would cost a page fault every 4 KiB.
        values = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        if values.numel():
            _read_bytes(path, begin, values.view(-1).view(torch.uint8).numpy().data)
        return values.to(device)


def _read_bytes(path: Path, begin: int, target: memoryview) -> None:
    """Fills `target` with the bytes of a file from `begin` on. Raises CheckpointError if it has become shorter."""
    where = printable_path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(target):  # a call reads at most 2 GiB
                count = os.preadv(descriptor, [target[done:]], begin + done)
                if count == 0:
                    raise CheckpointError(f"{where}: has become shorter while it was read; {_REPAIR}")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}; {_REPAIR}") from None


def _read_index(directory: Path) -> dict[str, str] | None:
    """The file of each tensor by the directory's index; None if its tensors are in one file without an index."""
    path = directory / WEIGHTS_INDEX
    if not os.path.lexists(path):
        if os.path.lexists(directory / WEIGHTS_FILE):
            return None
        raise CheckpointError(f"{printable_path(directory)}: {_without_weights(directory)}")
    try:
        files = read_json_object(path, _MAX_INDEX_BYTES).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_REPAIR}") from None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f'{printable_path(path)}: has no "weight_map" from tensors to files; {_REPAIR}')
    for name, file in files.items():
        _check_file_name(name, file, path)
    return files


def _check_file_name(tensor: str, file: Any, index: Path) -> None:
    if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
        raise CheckpointError(
            f"{printable_path(index)}: {format_value(tensor)} is in {format_value(file)}, expected the name of a "
            f".safetensors file in the same directory; {_REPAIR}"
        )


def _without_weights(directory: Path) -> str:
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        return f"has {shards[0]} and no {WEIGHTS_INDEX}, expected the index of its files; {_REPAIR}"
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return (
            f"has its weights in {pickles[0]}, which may run code when it is read; expected safetensors files: "
            "convert it with Transformers' save_pretrained first"
        )
    return f"has no {WEIGHTS_FILE} and no {WEIGHTS_INDEX}, expected a directory in Hugging Face's format"

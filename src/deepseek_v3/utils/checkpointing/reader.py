"""Readers of a checkpoint, one for a folder and one for a file, with one interface.

A reader has the plain values and the names, dtypes and shapes of all tensors as soon as it is open; it reads the
values of tensors only when they are used. `DcpReader` offers any reader to `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from deepseek_v3.utils.checkpointing.checks import TensorInfo, tensor_infos
from deepseek_v3.utils.checkpointing.errors import (
    REPAIR,
    checksum_error,
    is_folder,
    join_problems,
    read_error,
    require_regular_file,
)
from deepseek_v3.utils.checkpointing.index import INDEX_FILE, Extents, Index
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPES, HeaderEntry, map_bytes, read_header
from deepseek_v3.utils.checkpointing.single_file import load_file, verify_file
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import sha256_of_file


class CheckpointReader(ABC):
    """An open checkpoint.

    `tensors` gives the dtype and shape of each tensor by its dotted name (see `state_dict.flatten`), `plain` all
    other values as nested dicts, and `files` the names of the checkpoint's files with tensors.
    """

    path: Path
    plain: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[str]

    def verify(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Compares the checksums of every `num_ranks`-th file with its bytes, starting at file `rank`.

        Raises CheckpointError for a file that is damaged, missing or unreadable.
        """
        for name in self.files[rank::num_ranks]:
            self.verify_file(name)

    @abstractmethod
    def verify_file(self, name: str) -> None:
        """Compares the checksum of one file with its bytes. Raises CheckpointError as `verify` does."""

    @abstractmethod
    def chunks(self, name: str) -> list[tuple[Extents, Extents]]:
        """The offsets and sizes of the chunks in which a tensor is stored."""

    @abstractmethod
    def chunk(self, name: str, offsets: Extents) -> Tensor:
        """The chunk of a tensor at `offsets`, mapped into memory; never write to it."""

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor in new memory on the CPU."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(tensor, name)
        return tensor

    def read_into(self, target: Tensor, name: str, starts: Sequence[int] | None = None) -> None:
        """Fills `target`, on any device, with the block of a tensor that begins at `starts`, or at its start."""
        begins = starts or (0,) * target.ndim
        ends = [begin + size for begin, size in zip(begins, target.shape, strict=True)]
        for offsets, sizes in self.chunks(name):
            first = [max(pair) for pair in zip(begins, offsets, strict=True)]
            last = [min(end, at + size) for end, at, size in zip(ends, offsets, sizes, strict=True)]
            if all(low < high for low, high in zip(first, last, strict=True)):
                chunk = self.chunk(name, offsets)
                target[_box(first, last, begins)] = chunk[_box(first, last, offsets)].to(target.device)


def _box(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The positions from `first` to `last` of a tensor whose first element is at `origin`."""
    return tuple(slice(low - at, high - at) for low, high, at in zip(first, last, origin, strict=True))


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a checkpoint folder or file without checking the checksums of its tensors; `verify` does that.

    Raises CheckpointError if it is missing, or its list of contents is damaged.
    """
    return FolderReader(path) if is_folder(path) else FileReader(path)


class FolderReader(CheckpointReader):
    """Reads a folder that one or more ranks wrote."""

    def __init__(self, path: Path) -> None:
        index = Index.read(path)
        self.path, self.plain = path, index.plain
        self.files, self._files, self._index = sorted(index.files), index.files, index
        self.tensors = {
            name: TensorInfo(DTYPES[tensor.dtype], tensor.shape) for name, tensor in index.tensors.items()
        }
        self._chunks = {
            name: {chunk.offsets: chunk for chunk in tensor.chunks if 0 in tensor.shape or 0 not in chunk.sizes}
            for name, tensor in index.tensors.items()
        }
        self._mapped: dict[str, Tensor] = {}

    def verify_file(self, name: str) -> None:
        path, expected = self._path_of_size(name), self._files[name].sha256
        try:
            found = sha256_of_file(path)
            if found != expected:
                raise checksum_error(path, found, expected)
            self._compare_header(path)
        except OSError as error:  # the disk fails, or the folder is being deleted
            raise read_error(path, error) from None

    def _compare_header(self, path: Path) -> None:
        """Raises CheckpointError unless the header of a file agrees with the index about each of its tensors."""
        try:
            found = read_header(path)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: has no header of the safetensors format: {error}; {REPAIR}") from None
        expected = self._index.stored_in(path.name)
        problems = [
            f"has {_entry(found, name)} as {name!r}, and by {INDEX_FILE} {_entry(expected, name)}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        if problems:
            raise CheckpointError(f"{path}: {join_problems(problems)}; {REPAIR}")

    def chunks(self, name: str) -> list[tuple[Extents, Extents]]:
        return [(chunk.offsets, chunk.sizes) for chunk in self._chunks[name].values()]

    def chunk(self, name: str, offsets: Extents) -> Tensor:
        chunk, dtype = self._chunks[name][offsets], self.tensors[name].dtype
        if 0 in chunk.sizes:
            return torch.empty(chunk.sizes, dtype=dtype)
        if chunk.file not in self._mapped:
            path = self._path_of_size(chunk.file)
            try:
                self._mapped[chunk.file] = map_bytes(path, self._files[chunk.file].bytes)
            except RuntimeError:  # what torch raises for a file that has been deleted
                raise CheckpointError(f"{path}: cannot be mapped into memory; is it being deleted?") from None
        num_bytes = math.prod(chunk.sizes) * dtype.itemsize
        return self._mapped[chunk.file][chunk.begin :][:num_bytes].view(dtype).view(chunk.sizes)

    def _path_of_size(self, name: str) -> Path:
        """The path of a file that exists with the expected size. Raises CheckpointError otherwise."""
        path, expected = self.path / name, self._files[name].bytes
        try:
            found = require_regular_file(path)
            path.open("rb").close()
        except OSError as error:
            raise read_error(path, error) from None
        if found != expected:
            raise CheckpointError(f"{path}: has {found:,} bytes, expected {expected:,}; {REPAIR}")
        return path


def _entry(entries: dict[str, HeaderEntry], name: str) -> str:
    if name not in entries:
        return "nothing"
    entry = entries[name]
    return f"{entry.dtype} {list(entry.shape)} at byte {entry.begin}"


class FileReader(CheckpointReader):
    """Reads a single file, in which each tensor is one chunk."""

    def __init__(self, path: Path) -> None:
        state = load_file(path, verify=False, mmap=True)
        try:
            self._tensors, self.plain = flatten(state)
        except TypeError as error:
            raise CheckpointError(
                f"{path}: {error}, which checkpoint format 2 does not have; load it with the version of the "
                "program that wrote it"
            ) from None
        self.path, self.files = path, [path.name]
        self.tensors = tensor_infos(self._tensors)

    def verify_file(self, name: str) -> None:
        assert name == self.path.name
        try:
            verify_file(self.path)
        except OSError as error:
            raise read_error(self.path, error) from error

    def chunks(self, name: str) -> list[tuple[Extents, Extents]]:
        shape = self.tensors[name].shape
        return [((0,) * len(shape), shape)]

    def chunk(self, name: str, offsets: Extents) -> Tensor:
        assert not any(offsets)
        return self._tensors[name]


class DcpReader(StorageReader):
    """Lets `torch.distributed.checkpoint` read an open checkpoint into tensors that may be sharded differently."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self.checkpoint = checkpoint

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader serves one checkpoint."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the checkpoint is open already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Accepts every id: this project passes none."""
        return True

    def read_metadata(self) -> Metadata:
        """The dtypes, shapes and chunks of all tensors, in the classes of torch.distributed.checkpoint."""
        return Metadata({name: self._metadata_of(name) for name in self.checkpoint.tensors})

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the parts of tensors that the plan names into their destinations."""
        for item in plan.items:
            self._read(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        index = item.storage_index
        assert index.offset is not None
        chunk = self.checkpoint.chunk(index.fqn, tuple(index.offset))
        box = zip(item.storage_offsets, item.lengths, strict=True)
        target = planner.resolve_tensor(item).detach()
        target.copy_(chunk[tuple(slice(offset, offset + length) for offset, length in box)])
        planner.commit_tensor(item, target)

    def _metadata_of(self, name: str) -> TensorStorageMetadata:
        dtype, shape = self.checkpoint.tensors[name]
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in self.checkpoint.chunks(name)
        ]
        return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)

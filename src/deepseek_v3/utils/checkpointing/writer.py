"""Lets `torch.distributed.checkpoint` write checkpoint folders: tensors as safetensors files, the index as JSON.

Torch's own storage pickles its index. Torch's safetensors storage has no index: each rank that loads would open
every file and could not notice a missing one, and each rank that saves builds its file in memory first. `CpuStager`
copies the tensors to CPU memory first, so that training continues while they are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from deepseek_v3.utils.checkpointing.errors import write_error
from deepseek_v3.utils.checkpointing.index import Chunk, Index, StoredFile, StoredTensor, chunk_name
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES, write_tensor_file
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.files import partial_folder, publish_folder, remove_leftovers


class _Written(NamedTuple):
    """What each rank sends to the coordinator about the file that it wrote."""

    name: str
    file: StoredFile
    chunks: list[tuple[str, Chunk]]


class DcpWriter(StorageWriter):
    """Writes one folder: each rank writes its file, then the coordinator writes the index and publishes the folder.

    Only the coordinator's `plain` is written; the coordinator calls `completed` last.
    """

    def __init__(self, folder: Path, plain: dict[str, Any], completed: Callable[[], None]) -> None:
        self.folder, self.partial = folder, partial_folder(folder)
        self.plain, self.completed = plain, completed

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer serves one folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the global plan names the files."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Accepts every id: this project passes none."""
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes: creates the partial folder and names each rank's file."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder.parent)
            self.partial.mkdir()
        except OSError as error:
            raise write_error(self.folder, error) from None
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On each rank: writes its file, if the plan gives it anything to write."""
        written: Future[list[WriteResult]] = Future()
        written.set_result([self._write(plan.storage_data, plan.items, planner)] if plan.items else [])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written: writes the index and publishes the folder."""
        written: list[_Written] = [result.storage_data for rank in results for result in rank]
        self._require_all(written)
        index = Index(
            files={entry.name: entry.file for entry in written},
            tensors=_stored_tensors(metadata, written),
            plain=self.plain,
        )
        try:
            index.write(self.partial)
            publish_folder(self.folder)
        except OSError as error:
            raise write_error(self.folder, error) from None
        self.completed()

    def _write(self, name: str, items: list[WriteItem], planner: SavePlanner) -> WriteResult:
        tensors = {_key(item): _resolved(item, planner) for item in items}
        try:
            self.partial.mkdir(exist_ok=True)  # a network file system may not show it to this host yet
            num_bytes, sha256, begins = write_tensor_file(self.partial / name, tensors)
            reach("save")
        except OSError as error:
            raise write_error(self.folder / name, error) from None
        chunks = [
            (item.index.fqn, Chunk(file=name, begin=begins[_key(item)], offsets=box.offsets, sizes=box.sizes))
            for item in items
            for box in [_box(item)]
        ]
        entry = _Written(name, StoredFile(bytes=num_bytes, sha256=sha256), chunks)
        return WriteResult(MetadataIndex(name), num_bytes, entry)

    def _require_all(self, written: list[_Written]) -> None:
        for entry in written:
            path = self.partial / entry.name
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: was written by another host and is not visible on this one; "
                    "set checkpoint.directory to a folder that all hosts share"
                )


def _stored_tensors(metadata: Metadata, written: list[_Written]) -> dict[str, StoredTensor]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in sorted(metadata.state_dict_metadata)}
    for entry in written:
        for name, chunk in entry.chunks:
            chunks[name].append(chunk)
    return {name: _stored_tensor(metadata.state_dict_metadata[name], boxes) for name, boxes in chunks.items()}


def _stored_tensor(entry: Any, chunks: list[Chunk]) -> StoredTensor:
    assert isinstance(entry, TensorStorageMetadata)
    return StoredTensor(dtype=DTYPE_NAMES[entry.properties.dtype], shape=tuple(entry.size), chunks=tuple(chunks))


def _resolved(item: WriteItem, planner: SavePlanner) -> Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    return data.detach()


def _box(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _key(item: WriteItem) -> str:
    box = _box(item)
    assert item.tensor_data is not None
    return chunk_name(item.index.fqn, tuple(item.tensor_data.size), tuple(box.offsets), tuple(box.sizes))


class CpuStager(AsyncStager):
    """Copies this rank's shard of every tensor to CPU memory, which it reuses for the next save.

    New memory costs a page fault every 4 KiB, so the first save is the slowest. Torch's own stager does not reuse
    memory in some versions, and copies a whole storage if a tensor is a view.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: `stage` returns when everything is copied."""
        return False

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies the tensors and returns them unchanged: from now on only their shapes and shardings are read."""
        self._copies = {name: self._copy_of(name, tensor) for name, tensor in state_dict.items()}
        return state_dict

    def synchronize_staging(self) -> None:
        """Does nothing: `stage` has copied everything."""

    def close(self) -> None:
        """Does nothing: the memory is freed with this object."""

    def _copy_of(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = self._copies.get(name)
        if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
            copy = torch.empty(local.shape, dtype=local.dtype)
        return copy.copy_(local)


class StagedSavePlanner(DefaultSavePlanner):
    """Plans a save from the tensors themselves, and writes their staged copies."""

    def __init__(self, stager: CpuStager) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._stager = stager

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The staged copy of this rank's shard of a tensor."""
        return self._stager[index.fqn]

"""How `torch.distributed.checkpoint` reads our checkpoints, folders and files alike."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from deepseek_v3.utils.checkpoints.contents import Contents


class ContentsReader(StorageReader):
    """Reads any opened checkpoint, a folder or a file, into tensors that may be cut differently."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader serves one checkpoint."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: all is open already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Any; none is ever given."""
        return True

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in the terms of torch.distributed.checkpoint."""
        return Metadata({name: self._metadata_of(name) for name in self.contents.tensors})

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what the plan asks for to where it belongs."""
        for item in plan.items:
            self._read(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        index = item.storage_index
        assert index.offset is not None
        chunk = self.contents.chunk(index.fqn, tuple(index.offset))
        box = zip(item.storage_offsets, item.lengths, strict=True)
        target = planner.resolve_tensor(item).detach()
        target.copy_(chunk[tuple(slice(offset, offset + length) for offset, length in box)])
        planner.commit_tensor(item, target)

    def _metadata_of(self, name: str) -> TensorStorageMetadata:
        dtype, shape = self.contents.tensors[name]
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in self.contents.chunks(name)
        ]
        return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)

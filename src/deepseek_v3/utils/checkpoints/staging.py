"""Copies in CPU memory of what a rank is going to save, so that training can go on while they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor


class CpuCopies(AsyncStager):
    """Copies this rank's part of every tensor, and keeps the memory for the next save.

    Fresh memory costs a page fault every 4 KiB, which makes the first save the slowest. Torch's own stager keeps
    none in some versions, and copies whole storages where a tensor is a view.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]

    @property
    def should_synchronize_after_execute(self) -> bool:
        """No: `stage` returns when all is copied."""
        return False

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies the parts of these tensors and returns the tensors, of which only the layout is asked for now."""
        self._copies = {name: self._copy_of(name, tensor) for name, tensor in state_dict.items()}
        return state_dict

    def synchronize_staging(self) -> None:
        """Nothing: there is nothing to wait for."""

    def close(self) -> None:
        """Nothing: the memory goes with this object."""

    def _copy_of(self, name: str, tensor: Tensor) -> Tensor:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = self._copies.get(name)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            copy = torch.empty(part.shape, dtype=part.dtype)
        return copy.copy_(part)


class CopiesPlanner(DefaultSavePlanner):
    """Plans by the layout of the tensors themselves, and hands out their copies."""

    def __init__(self, copies: CpuCopies) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of this rank's part of a tensor."""
        return self._copies[index.fqn]

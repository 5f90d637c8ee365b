"""Which part of a whole tensor a rank's own tensor is, in words that saving and loading understand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


def as_sharded(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of `shape` whose part on this rank is `local`, in the same memory.

    `placements` cut the whole by one mesh dimension after the other: a stack of experts is cut by the expert
    dimension first, then by that of the sharded data parallel, `[Shard(0), Shard(0)]`, or `[Shard(0), Shard(1)]`
    where the latter cuts rows. Where a cut is uneven, earlier ranks hold more, as `torch.chunk` has it. Raises
    ValueError where `local` does not have the shape that this rank's part must have.
    """
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(
        local.detach(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    (part,) = whole.__create_chunk_list__()
    if part.sizes != local.shape:
        raise ValueError(
            f"a part of shape {list(local.shape)} of {list(shape)}, expected {list(part.sizes)} on this rank "
            f"where {mesh} is cut by {tuple(placements)}"
        )
    return whole

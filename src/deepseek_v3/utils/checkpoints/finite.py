"""Whether what a checkpoint holds, or is to hold, are numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from deepseek_v3.utils.checkpoints.ranks import gathered

_NAMED = 5  # tensors that a message names


def non_finite(tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> list[str]:
    """Names of the tensors that hold NaN or infinity in the part of any rank of `group`, the same on all of them.

    Reads every tensor once where it lies, without a copy, and waits for the device once.
    """
    names, finite = [], []
    for name, tensor in tensors.items():
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        if held.is_floating_point() and held.numel():
            names.append(name)
            finite.append(torch.stack(held.aminmax()).isfinite().all())
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []
    own = [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
    return sorted({name for found in gathered(group, own) for name in found})


def listed(names: Sequence[str]) -> str:
    """`3 tensors hold NaN or infinity: a, b, c`, with the first few names."""
    more = ", …" if len(names) > _NAMED else ""
    what = "1 tensor holds" if len(names) == 1 else f"{len(names)} tensors hold"
    return f"{what} NaN or infinity: {', '.join(names[:_NAMED])}{more}"

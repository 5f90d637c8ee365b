"""What a checkpoint's tensors are compared with before anything is read: names, shapes and types.

FOLDED: Whether what a checkpoint holds, or is to hold, are numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from deepseek_v3.utils.checkpointing.errors import join_problems
from deepseek_v3.utils.distributed.collectives import gather_objects
from deepseek_v3.utils.errors import CheckpointError

SAME_CONFIG_ADVICE = "resume with the config that it was saved with"


class TensorInfo(NamedTuple):
    """What a checkpoint says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The types and shapes of tensors; those of whole tensors where they are cut into parts."""
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def mismatches(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]) -> list[str]:
    """A problem for every expected tensor that a checkpoint lacks or has in another shape or type."""
    return [
        f"has no tensor {name!r}, which is needed here"
        if name not in found
        else f"{name!r} is {found[name]} there, {info} here"
        for name, info in expected.items()
        if found.get(name) != info
    ]


def unexpected_tensors(names: Iterable[str]) -> list[str]:
    """A problem for every tensor that nobody expects."""
    return [f"has the tensor {name!r}, which has no place here" for name in names]


def raise_problems(path: Path, problems: Iterable[str], advice: str) -> None:
    """Raises CheckpointError with all problems, each told once; nothing where there are none."""
    if found := list(dict.fromkeys(problems)):
        raise CheckpointError(f"{path}: {join_problems(found)}; {advice}")


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
    return sorted({name for found in gather_objects(group, own) for name in found})


def non_finite_summary(names: Sequence[str]) -> str:
    """`3 tensors hold NaN or infinity: a, b, c`, with the first few names."""
    more = ", …" if len(names) > _NAMED else ""
    what = "1 tensor holds" if len(names) == 1 else f"{len(names)} tensors hold"
    return f"{what} NaN or infinity: {', '.join(names[:_NAMED])}{more}"

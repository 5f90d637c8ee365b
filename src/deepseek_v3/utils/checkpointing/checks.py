"""Checks of a checkpoint's tensors: names, shapes and dtypes before reading, and whether values are finite."""

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
_MAX_NAMES = 5  # the most tensors that one message names


class TensorInfo(NamedTuple):
    """The dtype and the global shape of a tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The dtypes and shapes of tensors; the global shape of a DTensor."""
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def mismatches(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]) -> list[str]:
    """One problem for each expected tensor that a checkpoint lacks, or has with another shape or dtype."""
    return [
        f"has no tensor {name!r}, which is needed here"
        if name not in found
        else f"{name!r} is {found[name]} there, {info} here"
        for name, info in expected.items()
        if found.get(name) != info
    ]


def unexpected_tensors(names: Iterable[str]) -> list[str]:
    """One problem for each of these tensors, which a checkpoint has and the model does not."""
    return [f"has the tensor {name!r}, which has no place here" for name in names]


def raise_problems(path: Path, problems: Iterable[str], advice: str) -> None:
    """Raises a CheckpointError that lists each problem once; returns if there are none."""
    if found := list(dict.fromkeys(problems)):
        raise CheckpointError(f"{path}: {join_problems(found)}; {advice}")


def non_finite(tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> list[str]:
    """Names of the tensors with NaN or infinity in the local shard of any rank of `group`; the same on all ranks.

    Reads each tensor once on its device, without a copy, and synchronises with the device once.
    """
    names, finite = [], []
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        if local.is_floating_point() and local.numel():
            names.append(name)
            finite.append(torch.stack(local.aminmax()).isfinite().all())
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []
    own = [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
    return sorted({name for found in gather_objects(group, own) for name in found})


def non_finite_summary(names: Sequence[str]) -> str:
    """`3 tensors hold NaN or infinity: a, b, c`, with at most five names."""
    more = ", …" if len(names) > _MAX_NAMES else ""
    subject = "1 tensor holds" if len(names) == 1 else f"{len(names)} tensors hold"
    return f"{subject} NaN or infinity: {', '.join(names[:_MAX_NAMES])}{more}"

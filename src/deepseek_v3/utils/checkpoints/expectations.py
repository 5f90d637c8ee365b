"""What a checkpoint's tensors are compared with before anything is read: names, shapes and types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.utils.checkpoints.failures import listed
from deepseek_v3.utils.errors import CheckpointError

OTHER_CONFIG = "resume with the config that it was saved with"


class TensorInfo(NamedTuple):
    """What a checkpoint says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The types and shapes of tensors; those of whole tensors where they are cut into parts."""
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def unfit(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]) -> list[str]:
    """A problem for every expected tensor that a checkpoint lacks or has in another shape or type."""
    return [
        f"has no tensor {name!r}, which is needed here"
        if name not in found
        else f"{name!r} is {found[name]} there, {info} here"
        for name, info in expected.items()
        if found.get(name) != info
    ]


def unknown(names: Iterable[str]) -> list[str]:
    """A problem for every tensor that nobody expects."""
    return [f"has the tensor {name!r}, which has no place here" for name in names]


def refuse(path: Path, problems: Iterable[str], advice: str) -> None:
    """Raises CheckpointError with all problems, each told once; nothing where there are none."""
    if found := list(dict.fromkeys(problems)):
        raise CheckpointError(f"{path}: {listed(found)}; {advice}")

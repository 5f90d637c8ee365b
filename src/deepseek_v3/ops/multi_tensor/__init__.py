"""Operations on many tensors at once: on a GPU, one kernel for all of them instead of several for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.multi_tensor import reference
from deepseek_v3.ops.multi_tensor.reference import AdamWStep
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = ["MULTI_TENSOR", "AdamWStep", "MultiTensor", "adamw_", "sum_of_squares"]


class MultiTensor(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def adamw_(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        means: Sequence[Tensor],
        squares: Sequence[Tensor],
        scale: Tensor,
        step: AdamWStep,
    ) -> None: ...

    def sum_of_squares(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor: ...


def _triton() -> MultiTensor:
    from deepseek_v3.ops.multi_tensor import triton

    return triton


MULTI_TENSOR: Operation[MultiTensor] = Operation(
    "multi_tensor", Backend("triton", _triton, triton_obstacle), Backend("reference", lambda: reference)
)


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    scale: Tensor,
    step: AdamWStep,
) -> None:
    """The reference's `adamw_`, by the back end of the device that the tensors are on."""
    _backend(scale.device).adamw_(parameters, gradients, means, squares, scale, step)


def sum_of_squares(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The reference's `sum_of_squares`, by the back end of the device that the tensors are on."""
    return _backend(tensors[0].device).sum_of_squares(tensors, weights)


@cache
def _backend(device: torch.device) -> MultiTensor:
    """Selected once per device: an optimizer that offloads its state updates tensors on several devices."""
    return MULTI_TENSOR.select(Target(device)).run

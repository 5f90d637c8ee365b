"""Operations on many tensors at once: on a GPU, one kernel for all of them instead of several for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from deepseek_v3.ops.multi_tensor import reference
from deepseek_v3.ops.multi_tensor.reference import AdamWStep
from deepseek_v3.ops.operation import Backend, Operation, triton_obstacle

__all__ = ["MULTI_TENSOR", "AdamWStep", "MultiTensor"]


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

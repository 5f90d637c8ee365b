"""Operations on many tensors at once: on a GPU, one kernel for all of them instead of several for each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_v3.ops.multi_tensor import reference
from deepseek_v3.ops.multi_tensor.reference import AdamWStep
from deepseek_v3.utils.lazily import imported

__all__ = ["AdamWStep", "adamw_", "sum_of_squares"]

_TRITON = "deepseek_v3.ops.multi_tensor.triton"  # not every build of torch brings the compiler


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    scale: Tensor,
    step: AdamWStep,
) -> None:
    """One step of AdamW in place, on contiguous tensors of one device; `scale`, 0-d, multiplies the gradients.

    Where `scale` is NaN nothing changes, whatever the gradients are.
    Parameters are float32, moments float32 or bfloat16, all of one type; arithmetic is float32.
    """
    update = imported(f"{_TRITON}:adamw_") if scale.is_cuda else reference.adamw_
    update(parameters, gradients, means, squares, scale, step)


def sum_of_squares(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum over all numbers of these tensors of their squares, times the weight of their tensor: 0-d float32."""
    add_up = imported(f"{_TRITON}:sum_of_squares") if tensors[0].is_cuda else reference.sum_of_squares
    return add_up(tensors, weights)

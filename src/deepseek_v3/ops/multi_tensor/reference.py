"""AdamW (arXiv:1711.05101) and sums of squares, tensor by tensor in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 18  # numbers updated at a time: the intermediate results then fit a CPU's caches


class AdamWStep(NamedTuple):
    """Factors of step t: `decay` 1 - lr · weight decay, `size` lr / (1 - β1^t), `correction` 1 / (1 - β2^t).

    `size` and `correction` may be 0-d tensors on the device of the parameters, for a t that only the device knows.
    """

    decay: float
    size: float | Tensor
    correction: float | Tensor
    beta1: float
    beta2: float
    eps: float


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    scale: Tensor,
    step: AdamWStep,
) -> None:
    """One step of AdamW in place, on contiguous tensors of one device; `scale`, 0-d, multiplies the gradients.

    Parameters are float32; `means` and `squares`, the moments, are float32 or bfloat16, all of one type; gradients
    have any float type. Arithmetic is float32. If `scale` is NaN nothing changes, whatever the gradients are.
    """
    if scale.isnan():
        return
    for tensors in zip(parameters, gradients, means, squares, strict=True):
        chunks = (tensor.view(-1).split(_CHUNK) for tensor in tensors)
        for parameter, gradient, mean, square in zip(*chunks, strict=True):
            _update(parameter, gradient, mean, square, scale, step)


def _update(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, scale: Tensor, step: AdamWStep
) -> None:
    gradient = gradient.float() * scale
    new_mean = mean.float() * step.beta1 + gradient * (1 - step.beta1)
    new_square = square.float() * step.beta2 + gradient.square() * (1 - step.beta2)
    direction = new_mean / ((new_square * step.correction).sqrt() + step.eps)
    parameter.copy_(parameter * step.decay - direction * step.size)
    mean.copy_(new_mean)
    square.copy_(new_square)


def sum_of_squares(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · (sum of the tensor's squares) over tensors on one device, 0-d float32."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return (norms.float().square() * norms.new_tensor(weights)).sum()

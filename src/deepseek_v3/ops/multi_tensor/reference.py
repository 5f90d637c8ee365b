"""AdamW (arXiv:1711.05101) and norms, tensor by tensor in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers updated at a time: what the update makes on its way then stays in a CPU's caches, and small.
_PIECE = 1 << 18


class AdamWStep(NamedTuple):
    """Factors of step t: `decay` 1 - lr · weight decay, `size` lr / (1 - β1^t), `correction` 1 / (1 - β2^t).

    `size` and `correction` may be 0-d tensors on the device of the parameters, where t is known only there.
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
    if scale.isnan():
        return
    for tensors in zip(parameters, gradients, means, squares, strict=True):
        pieces = (tensor.view(-1).split(_PIECE) for tensor in tensors)
        for parameter, gradient, mean, square in zip(*pieces, strict=True):
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
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return (norms.float().square() * norms.new_tensor(weights)).sum()

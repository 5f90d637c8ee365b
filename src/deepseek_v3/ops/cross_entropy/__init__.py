"""The loss of a linear head over a vocabulary."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.cross_entropy.chunked import linear_argmax, linear_cross_entropy
from deepseek_v3.ops.cross_entropy.reference import IGNORED
from deepseek_v3.ops.cross_entropy.reference import linear_cross_entropy as reference_linear_cross_entropy
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = [
    "CROSS_ENTROPY",
    "IGNORED",
    "LinearCrossEntropy",
    "linear_argmax",
    "linear_cross_entropy",
    "reference_linear_cross_entropy",
]


def _triton() -> LinearCrossEntropy:
    from deepseek_v3.ops.cross_entropy import triton

    return triton.linear_cross_entropy


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "needs float32, bfloat16 or float16"
    return triton_obstacle(target)


CROSS_ENTROPY: Operation[LinearCrossEntropy] = Operation(
    "cross_entropy",
    Backend("triton", _triton, _triton_obstacle),
    Backend("chunked", lambda: linear_cross_entropy),
    Backend("reference", lambda: reference_linear_cross_entropy),
)

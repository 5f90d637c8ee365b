"""The product of a linear layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.linear.reference import linear
from deepseek_v3.ops.linear.wide_gradient import linear as wide_gradient_linear
from deepseek_v3.ops.operation import Backend, Operation, Target

LinearProduct = Callable[[Tensor, Tensor], Tensor]

__all__ = ["LINEAR", "LinearProduct", "linear", "wide_gradient_linear"]


def _wide_gradient_obstacle(target: Target) -> str | None:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    return None if target.dtype == torch.bfloat16 else "needs bfloat16"


LINEAR: Operation[LinearProduct] = Operation(
    "linear",
    Backend("wide_gradient", lambda: wide_gradient_linear, _wide_gradient_obstacle),
    Backend("reference", lambda: linear),
)

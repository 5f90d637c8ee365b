"""The product of a linear layer whose weight's gradient is summed in float32 and stays in it.

Autograd's gradient of a float32 weight that computes in bfloat16 is rounded to bfloat16, written, read, widened and
written again. Here the product writes float32 itself.

Axes: T rows, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.dtypes import product_in_float32
from deepseek_v3.ops.linear import reference
from deepseek_v3.ops.operation import custom_op, fake_of


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """The reference's `linear`; differentiable once where `x` is bfloat16 and the weight float32."""
    if (x.dtype, weight_OI.dtype) != (torch.bfloat16, torch.float32) or not torch.is_grad_enabled():
        return reference.linear(x, weight_OI)
    return _Linear.apply(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x, weight_OI.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = grad @ weight_OI.to(grad.dtype) if needs_x else None
        rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad_x, _weight_gradient(*rows) if needs_weight else None


@custom_op("weight_gradient")
def _weight_gradient(grad_TO: Tensor, x_TI: Tensor) -> Tensor:
    return product_in_float32(grad_TO.T, x_TI)


@fake_of(_weight_gradient)
def _(grad_TO: Tensor, x_TI: Tensor) -> Tensor:
    return grad_TO.new_empty(grad_TO.shape[1], x_TI.shape[1], dtype=torch.float32)

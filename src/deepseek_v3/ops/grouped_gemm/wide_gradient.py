"""The products of experts whose weights' gradients are summed in float32 and stay in it.

`F.grouped_mm` returns the gradient in bfloat16, which autograd then reads, widens and writes again. Here a kernel
writes float32 itself.

Axes: X rows in expert order, E experts, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.grouped_gemm import cuda, reference, torch_grouped
from deepseek_v3.ops.operation import custom_op, fake_of


def grouped_linear(x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The reference's `grouped_linear`; differentiable once where `x` is bfloat16 and the weight float32.

    Widths must be multiples of 8. Rows from ends[-1] on belong to no group; their results are undefined.
    """
    if (x_XI.dtype, weight_EOI.dtype) != (torch.bfloat16, torch.float32) or not torch.is_grad_enabled():
        return torch_grouped.grouped_linear(x_XI, weight_EOI, ends_E)
    return _GroupedLinear.apply(x_XI, weight_EOI, ends_E)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        weight_EOI = weight_EOI.to(x_XI.dtype)
        ctx.save_for_backward(x_XI, weight_EOI, ends_E)
        return F.grouped_mm(x_XI, weight_EOI.transpose(-2, -1), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_XI, weight_EOI, ends_E = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_XO = grad_XO.contiguous()
        grad_XI = F.grouped_mm(grad_XO, weight_EOI, offs=ends_E) if needs_x else None
        return grad_XI, _weight_gradient(grad_XO, x_XI, ends_E) if needs_weight else None, None


@custom_op("grouped_weight_gradient")
def _weight_gradient(grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> Tensor:
    backend = cuda if grad_XO.is_cuda else reference
    return backend.weight_gradient(grad_XO, x_XI, ends_E)


@fake_of(_weight_gradient)
def _(grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> Tensor:
    return grad_XO.new_empty(len(ends_E), grad_XO.shape[1], x_XI.shape[1], dtype=torch.float32)

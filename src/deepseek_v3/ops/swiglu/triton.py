"""SwiGLU of the experts' rows in one kernel forward and one backward, each of which reads and writes a number once.

Axes: X rows, F width of gate, up and result, G = 2·F.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.operation import custom_op, fake_of

_NUMBERS = 2048  # numbers of the result in one step of a program
_MOST_COLUMNS = 1024  # of them in one row


def packed_swiglu(gate_up_XG: Tensor, weights_X: Tensor) -> Tensor:
    """The reference's `packed_swiglu` for float32 and bfloat16, with float32 weights; differentiable once."""
    return _PackedSwiGLU.apply(gate_up_XG, weights_X)


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_XG: Tensor, weights_X: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_XG, weights_X)
        return _forward(gate_up_XG, weights_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XF: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(*ctx.saved_tensors, grad_XF)


@custom_op("packed_swiglu")
def _forward(gate_up_XG: Tensor, weights_X: Tensor) -> Tensor:
    out_XF = _empty_result(gate_up_XG, weights_X)
    _launch(_swiglu_kernel, out_XF, gate_up_XG.contiguous(), weights_X.contiguous(), out_XF)
    return out_XF


@custom_op("packed_swiglu_backward")
def _backward(gate_up_XG: Tensor, weights_X: Tensor, grad_XF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the weights."""
    grad_gate_up_XG, grad_weights_X = _empty_gradients(gate_up_XG, weights_X, grad_XF)
    tensors = (gate_up_XG.contiguous(), weights_X.contiguous(), grad_XF.contiguous())
    _launch(_swiglu_backward_kernel, grad_XF, *tensors, grad_gate_up_XG, grad_weights_X)
    return grad_gate_up_XG, grad_weights_X


@fake_of(_forward)
def _empty_result(gate_up_XG: Tensor, weights_X: Tensor) -> Tensor:  # noqa: ARG001 -- the operator's signature
    return gate_up_XG.new_empty(gate_up_XG.shape[0], gate_up_XG.shape[1] // 2)


@fake_of(_backward)
def _empty_gradients(
    gate_up_XG: Tensor,
    weights_X: Tensor,
    grad_XF: Tensor,  # noqa: ARG001 -- the operator's signature
) -> tuple[Tensor, Tensor]:
    return gate_up_XG.new_empty(gate_up_XG.shape), weights_X.new_empty(weights_X.shape)


def _launch(kernel: Any, like_XF: Tensor, *tensors: Tensor) -> None:
    rows, width = like_XF.shape
    if rows and width:
        columns = min(_MOST_COLUMNS, triton.next_power_of_2(width))
        per_program = _NUMBERS // columns
        kernel[(triton.cdiv(rows, per_program),)](*tensors, rows, width, ROWS=per_program, COLUMNS=columns)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(gate_up, weights, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < rows, other=0.0)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        gate_at = gate_up + row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
        product = gate * tl.sigmoid(gate) * up * weight[:, None]
        out_at = out + row[:, None] * width + column[None, :]
        tl.store(out_at, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(
    gate_up,
    weights,
    grads,
    grad_gate_up,
    grad_weights,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < rows, other=0.0)
    grad_weight = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        activated = gate * sigmoid
        grad_weight += tl.sum(grad * activated * up, 1)
        grad = grad * weight[:, None]
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + at, (grad * up * slope).to(kind), mask=inside)
        tl.store(grad_gate_up + at + width, (grad * activated).to(kind), mask=inside)
    tl.store(grad_weights + row, grad_weight, mask=row < rows)

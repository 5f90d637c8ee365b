"""The product of the router on the tensor cores of a GPU, as exact as in float32.

A float32 number is the sum of three bfloat16 numbers, of 8 bits each. Rows of tokens are bfloat16 already, so three
products with the parts of the weight are the product with the weight itself. The gradient of the weight needs the
three parts of the logits' gradient in the same way. The gradient of the rows is rounded to bfloat16, so 16 bits of
both factors are enough for it.

Tensor cores cut off the bits of a sum that do not fit, so that long sums lose a little at every step, always
towards zero (Fasi et al. 2021, PeerJ CS 7:e330). The kernel lets them add at most 64 products of each part, and
adds these short sums in float32, rounded to nearest. The error of a sum of K products is then at most
(128 + K / 64) · 2⁻²⁴ of the sum of their magnitudes: each of the 12 instructions of a short sum cuts off 17 addends
at 2⁻²⁵ of the largest one, and its result at 2⁻²³. One by one in float32, the bound is K · 2⁻²⁴.

Every step is inside an operator that torch.compile does not look into, because in a compiled kernel a number keeps
all of its bits where it is rounded to bfloat16 and widened again.

Axes: T tokens, D model width, E experts, P = 3·E; of a product M rows, N columns, K products of each sum, S ranges
of K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.operation import custom_op, fake_of

_ROWS = 128  # of a program's tile
_COLUMNS = 128  # of a program's tile, at most
_ADDENDS = 64  # products of each part in one sum on the tensor cores
_PROGRAMS = 132  # the multiprocessors of an H200
_SHORTEST = 8 * _ADDENDS  # products of a range of K: enough to pay for the sum over the ranges


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The reference's `router_logits` for bfloat16 rows and a float32 weight; differentiable once."""
    return _RouterProduct.apply(x_TD, weight_ED)


class _RouterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _product(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(*ctx.saved_tensors, grad_TE)


@custom_op("router_logits")
def _product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return _product_of_parts(x_TD, torch.stack(_parts(weight_ED)).mT)


@custom_op("router_logits_backward")
def _gradients(x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weight."""
    first_TE, second_TE, third_TE = _parts(grad_TE)
    first_ED, second_ED, _ = _parts(weight_ED)
    grad_TP = torch.cat((first_TE, second_TE, third_TE), dim=1)
    grad_weight_DE = _product_of_parts(x_TD.T, grad_TP.unflatten(1, (3, -1)).transpose(0, 1))
    # The products first · first, second · first and first · second; those left out are below 2^-16 of the first.
    grad_TP[:, -weight_ED.shape[0] :] = first_TE
    grad_x_TD = grad_TP @ torch.cat((first_ED, first_ED, second_ED))
    return grad_x_TD, grad_weight_DE.T.contiguous()


@fake_of(_product)
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return weight_ED.new_empty(x_TD.shape[0], weight_ED.shape[0])


@fake_of(_gradients)
def _(x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _parts(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is `wide`."""
    first = wide.bfloat16()
    rest = wide - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


def _product_of_parts(a_MK: Tensor, parts_3KN: Tensor) -> Tensor:
    """The product of a bfloat16 matrix and the sum of three others, (M, N) float32.

    Programs compute tiles; where these are few, several programs share the sums of one, each with a range of K.
    """
    (rows, addends), columns = a_MK.shape, parts_3KN.shape[2]
    width = min(_COLUMNS, max(16, triton.next_power_of_2(columns)))
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(columns, width)
    ranges = max(1, min(_PROGRAMS // max(1, tiles), addends // _SHORTEST))
    length = triton.cdiv(triton.cdiv(addends, ranges), _ADDENDS) * _ADDENDS
    out_SMN = torch.empty(ranges, rows, columns, dtype=torch.float32, device=a_MK.device)
    if out_SMN.numel():
        _product_of_parts_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, width), ranges)](
            a_MK,
            parts_3KN,
            out_SMN,
            rows,
            columns,
            addends,
            length,
            *a_MK.stride(),
            *parts_3KN.stride(),
            ROWS=_ROWS,
            COLUMNS=width,
            ADDENDS=_ADDENDS,
            num_warps=8,
            num_stages=3,
        )
    return out_SMN[0] if ranges == 1 else out_SMN.sum(0)


@triton.jit
def _product_of_parts_kernel(
    a,
    parts,
    out,
    rows,
    columns,
    addends,
    length,
    a_row,
    a_addend,
    part,
    part_addend,
    part_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADDENDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_range = tl.program_id(2).to(tl.int64)
    begin = of_range * length
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, tl.minimum(begin + length, addends), ADDENDS):
        addend = start + tl.arange(0, ADDENDS).to(tl.int64)
        here_a = (row[:, None] < rows) & (addend[None, :] < addends)
        here_b = (addend[:, None] < addends) & (column[None, :] < columns)
        factor = tl.load(a + row[:, None] * a_row + addend[None, :] * a_addend, mask=here_a, other=0.0)
        first = parts + addend[:, None] * part_addend + column[None, :] * part_column
        # The smallest products first. With `total` as the accumulator the tensor cores would add to a long sum.
        short = tl.dot(factor, tl.load(first + 2 * part, mask=here_b, other=0.0))
        short = tl.dot(factor, tl.load(first + part, mask=here_b, other=0.0), short)
        short = tl.dot(factor, tl.load(first, mask=here_b, other=0.0), short)
        total += short
    place = (of_range * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + place, total, mask=(row[:, None] < rows) & (column[None, :] < columns))

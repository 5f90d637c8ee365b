"""Copies of rows in any number for each: made by one gather, summed by another.

`permute` and `unpermute` are the case of K copies of every row. Sums are taken in float32 at least, in a fixed
order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.utils.lazily import imported

_SUMMED_BY_KERNEL = (torch.float32, torch.bfloat16)  # its sums are float32


class Copies(NamedTuple):
    """Which copies there are of T rows.

    `source_X` int64: the row that each copy is of. `slots_TM` int64: for each row its copies, and in slots that are
    left over X or more.
    """

    source_X: Tensor
    slots_TM: Tensor


def spread(x_TD: Tensor, copies: Copies) -> Tensor:
    """A row for each copy: (X, D)."""
    return _Spread.apply(x_TD, *copies)


def sum_copies(rows_XD: Tensor, copies: Copies) -> Tensor:
    """For each row the sum of its copies, 0 where there are none: (T, D)."""
    return _SumCopies.apply(rows_XD, *copies)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_X: Tensor, slots_TM: Tensor) -> Tensor:
        ctx.save_for_backward(slots_TM)
        return x_TD[source_X]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None]:
        (slots_TM,) = ctx.saved_tensors
        return _sums(grad_XD, slots_TM), None, None


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, source_X: Tensor, slots_TM: Tensor) -> Tensor:
        ctx.save_for_backward(source_X)
        return _sums(rows_XD, slots_TM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (source_X,) = ctx.saved_tensors
        return grad_TD[source_X], None, None


def _sums(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
    if rows_XD.is_cuda and rows_XD.dtype in _SUMMED_BY_KERNEL:
        return imported("deepseek_v3.ops.moe_permute.triton:sum_rows")(rows_XD, slots_TM)
    with_none_XD = torch.cat([rows_XD, rows_XD.new_zeros(1, rows_XD.shape[1])])
    wide = torch.promote_types(rows_XD.dtype, torch.float32)
    return with_none_XD[slots_TM.clamp(max=len(rows_XD))].sum(1, dtype=wide).to(rows_XD.dtype)

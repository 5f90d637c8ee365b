"""Copying rows and summing the copies, differentiably: the backward pass of each operation is the other one.

Autograd's own backward pass of an index is a scattered addition, which is slow on GPUs and sums in no fixed order.
Here the slots of each row are known, so both directions are gathers, and sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.moe_permute import reference
from deepseek_v3.ops.moe_permute.reference import BinOrder, ExpertBins, RowCopies

GatherRows = Callable[[Tensor, RowCopies], Tensor]
SumRows = Callable[[Tensor, Tensor], Tensor]


class MoePermute(Protocol):
    """The interface of a back end, as `reference.py` defines it. It needs no backward passes."""

    def gather_rows(self, x_TD: Tensor, copies: RowCopies) -> Tensor: ...

    def sum_rows(self, rows_XD: Tensor, slots_TM: Tensor) -> Tensor: ...

    def sort_into_bins(self, experts_TK: Tensor, bins: ExpertBins, once: bool = False) -> BinOrder: ...


def gather_rows(x_TD: Tensor, copies: RowCopies, backend: MoePermute = reference) -> Tensor:
    """One row for each copy: (X, D)."""
    return _GatherRows.apply(x_TD, *copies, backend.gather_rows, backend.sum_rows)


def sum_rows(rows_XD: Tensor, copies: RowCopies, backend: MoePermute = reference) -> Tensor:
    """The sum of the copies of each row, 0 if it has none: (T, D), summed in float32 and rounded once."""
    return _SumRows.apply(rows_XD, *copies, backend.gather_rows, backend.sum_rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, source_X: Tensor, slots_TM: Tensor, gather_rows: GatherRows, sum_rows: SumRows
    ) -> Tensor:
        ctx.save_for_backward(slots_TM)
        ctx.sum_rows = sum_rows
        return gather_rows(x_TD, RowCopies(source_X, slots_TM))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slots_TM,) = ctx.saved_tensors
        return ctx.sum_rows(grad_XD, slots_TM), None, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_XD: Tensor, source_X: Tensor, slots_TM: Tensor, gather_rows: GatherRows, sum_rows: SumRows
    ) -> Tensor:
        ctx.save_for_backward(source_X, slots_TM)
        ctx.gather_rows = gather_rows
        return sum_rows(rows_XD, slots_TM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None, None]:
        source_X, slots_TM = ctx.saved_tensors
        return ctx.gather_rows(grad_TD, RowCopies(source_X, slots_TM)), None, None, None, None

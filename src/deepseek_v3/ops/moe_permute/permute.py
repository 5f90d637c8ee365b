"""Copies of rows in any number for each: made by one gather, summed by another.

`permute` and `unpermute` are the case of K copies of every row. Sums are taken in float32 at least, in a fixed
order.


FOLDED: Expert order and back with gathers in both directions.

Autograd's own backward of an index is a scattered addition: slow on GPUs, and its order of summation is not
fixed there. A permutation's backward is another gather, because its inverse is known.



FOLDED: Which tokens go to which ranks, or to which experts of one: choices lined up by bins of experts.

Axes: T tokens, K experts per token, N = T·K choices, B bins.

"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.moe_permute.reference import ExpertOrder
from deepseek_v3.utils.lazily import imported

_SUMMED_BY_KERNEL = (torch.float32, torch.bfloat16)  # its sums are float32


class RowCopies(NamedTuple):
    """Which copies there are of T rows.

    `source_X` int64: the row that each copy is of. `slots_TM` int64: for each row its copies, and in slots that are
    left over X or more.
    """

    source_X: Tensor
    slots_TM: Tensor


def gather_rows(x_TD: Tensor, copies: RowCopies) -> Tensor:
    """A row for each copy: (X, D)."""
    return _GatherRows.apply(x_TD, *copies)


def sum_rows(rows_XD: Tensor, copies: RowCopies) -> Tensor:
    """For each row the sum of its copies, 0 where there are none: (T, D)."""
    return _SumRows.apply(rows_XD, *copies)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_X: Tensor, slots_TM: Tensor) -> Tensor:
        ctx.save_for_backward(slots_TM)
        return x_TD[source_X]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None]:
        (slots_TM,) = ctx.saved_tensors
        return _sums(grad_XD, slots_TM), None, None


class _SumRows(torch.autograd.Function):
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


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_X)
        ctx.num_tokens = x_TD.shape[0]
        return x_TD[order_X // (order_X.numel() // x_TD.shape[0])]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_X,) = ctx.saved_tensors
        return _sum_copies(grad_XD, inverse_X, ctx.num_tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, order_X: Tensor, inverse_X: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.copies = order_X.numel() // num_tokens
        return _sum_copies(rows_XD, inverse_X, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_X,) = ctx.saved_tensors
        return grad_TD[order_X // ctx.copies], None, None, None


def _sum_copies(rows_XD: Tensor, inverse_X: Tensor, num_tokens: int) -> Tensor:
    wide = torch.promote_types(rows_XD.dtype, torch.float32)
    return rows_XD[inverse_X].unflatten(0, (num_tokens, -1)).sum(1, dtype=wide).to(rows_XD.dtype)


def permute(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """The reference's `permute`, with a backward that gathers and sums in float32."""
    return _Permute.apply(x_TD, order.order_X, order.inverse_X)


def unpermute(rows_XD: Tensor, order: ExpertOrder, num_tokens: int) -> Tensor:
    """The reference's `unpermute`, summed in float32 and rounded once, with a backward that gathers."""
    return _Unpermute.apply(rows_XD, order.order_X, order.inverse_X, num_tokens)


class ExpertBins(NamedTuple):
    """Consecutive runs of experts: so many, of `size` each, from expert `first` on."""

    first: int
    size: int
    number: int


class BinOrder(NamedTuple):
    """Choices in the order of their bins, and within a bin of their tokens.

    `tokens_N` and `choices_N` int64: the token of each, and its place in the flattened table; only as many are set
    as have a place. `places_TK` int64: the place of each choice, N where it has none. `ends_B` int32: where each
    bin's places end. `counts_B2` int64: places and choices of each bin.
    """

    tokens_N: Tensor
    choices_N: Tensor
    places_TK: Tensor
    ends_B: Tensor
    counts_B2: Tensor

    def copies(self, number: int) -> RowCopies:
        """The places, of which there are so many, as copies of the tokens."""
        return RowCopies(self.tokens_N[:number], self.places_TK)

    def copies_of_choices(self, number: int) -> RowCopies:
        """The places as copies of the choices."""
        return RowCopies(self.choices_N[:number], self.places_TK.reshape(-1, 1))


def sort_into_bins(experts_TK: Tensor, bins: ExpertBins, once: bool = False) -> BinOrder:
    """Lines chosen experts (T, K), whole numbers, up by bins; those in no bin have no place.

    With `once`, a token that chose several experts of a bin has one place there, that of the first of them. On a
    GPU two kernels do all of it, because a training step has more to launch than time for launching.
    """
    if experts_TK.is_cuda and experts_TK.numel():
        return BinOrder(*imported("deepseek_v3.ops.moe_permute.triton:sort_into_bins")(experts_TK, *bins, once))
    return reference_sort_into_bins(experts_TK, bins, once)


def reference_sort_into_bins(experts_TK: Tensor, bins: ExpertBins, once: bool = False) -> BinOrder:
    """The same by a stable sort."""
    offsets_TK = experts_TK.long() - bins.first
    inside_TK = (offsets_TK >= 0) & (offsets_TK < bins.number * bins.size)
    bins_TK = torch.where(inside_TK, offsets_TK // bins.size, bins.number)
    placed_TK = torch.where(_repeats_an_earlier_one(bins_TK), bins.number, bins_TK) if once else bins_TK
    choices_N = placed_TK.flatten().argsort(stable=True)
    ranks_N = torch.empty_like(choices_N)
    ranks_N[choices_N] = torch.arange(choices_N.numel(), device=choices_N.device)
    places_TK = ranks_N.view_as(placed_TK).masked_fill(placed_TK == bins.number, choices_N.numel())
    counts_B2 = torch.stack([_counts(placed_TK, bins), _counts(bins_TK, bins)], dim=1)
    ends_B = counts_B2[:, 0].cumsum(0).int()
    return BinOrder(choices_N // max(1, experts_TK.shape[1]), choices_N, places_TK, ends_B, counts_B2)


def _repeats_an_earlier_one(bins_TK: Tensor) -> Tensor:
    return (bins_TK[:, :, None] == bins_TK[:, None, :]).tril(-1).any(-1)


def _counts(bins_TK: Tensor, bins: ExpertBins) -> Tensor:
    return torch.bincount(bins_TK.flatten(), minlength=bins.number + 1)[:-1]

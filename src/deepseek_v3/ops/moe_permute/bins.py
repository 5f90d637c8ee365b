"""Which tokens go to which ranks, or to which experts of one: choices lined up by bins of experts.

Axes: T tokens, K experts per token, N = T·K choices, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.ops.moe_permute.copies import Copies
from deepseek_v3.utils.lazily import imported


class Bins(NamedTuple):
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

    def copies(self, number: int) -> Copies:
        """The places, of which there are so many, as copies of the tokens."""
        return Copies(self.tokens_N[:number], self.places_TK)

    def copies_of_choices(self, number: int) -> Copies:
        """The places as copies of the choices."""
        return Copies(self.choices_N[:number], self.places_TK.reshape(-1, 1))


def line_up(experts_TK: Tensor, bins: Bins, once: bool = False) -> BinOrder:
    """Lines chosen experts (T, K), whole numbers, up by bins; those in no bin have no place.

    With `once`, a token that chose several experts of a bin has one place there, that of the first of them. On a
    GPU two kernels do all of it, because a training step has more to launch than time for launching.
    """
    if experts_TK.is_cuda and experts_TK.numel():
        return BinOrder(*imported("deepseek_v3.ops.moe_permute.triton:line_up")(experts_TK, *bins, once))
    return reference_line_up(experts_TK, bins, once)


def reference_line_up(experts_TK: Tensor, bins: Bins, once: bool = False) -> BinOrder:
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


def _counts(bins_TK: Tensor, bins: Bins) -> Tensor:
    return torch.bincount(bins_TK.flatten(), minlength=bins.number + 1)[:-1]

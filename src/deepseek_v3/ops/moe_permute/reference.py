"""Moving token rows into expert order and back, in plain torch.

Both directions work on copies of rows: `gather_rows` makes the copies, `sum_rows` sums them again. Permuting tokens
for K experts each is the case of K copies of every row.

Axes: T tokens, K experts per token, N = T·K choices, X copies, M copies of one row at most, D model width, E
experts, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowCopies(NamedTuple):
    """X copies of T rows.

    `source_X` int64: the row of which each is a copy. `slots_TM` int64: the copies of each row; unused slots hold X
    or a larger number. Every copy has exactly one slot.
    """

    source_X: Tensor
    slots_TM: Tensor


class ExpertOrder(NamedTuple):
    """The N choices of T tokens in the order of their experts.

    `choices_X` int64: the choice at each place in that order, as an index of the flattened (T, K) table;
    `places_TK` int64: the place of each choice; `ends_E` int32: the end of each expert's places.
    """

    choices_X: Tensor
    places_TK: Tensor
    ends_E: Tensor

    def copies(self) -> RowCopies:
        """The places as copies of the tokens."""
        return RowCopies(self.choices_X // max(1, self.places_TK.shape[1]), self.places_TK)

    def copies_of_choices(self) -> RowCopies:
        """The places as copies of the choices."""
        return RowCopies(self.choices_X, self.places_TK.reshape(-1, 1))


class ExpertBins(NamedTuple):
    """`number` consecutive bins of `size` consecutive experts each, from expert `first` on."""

    first: int
    size: int
    number: int


class BinOrder(NamedTuple):
    """Choices in the order of their bins; within a bin, in the order of their tokens.

    `tokens_N` and `choices_N` int64: the token and the choice at each place, a choice as an index of the flattened
    (T, K) table; entries after the last place are undefined. `places_TK` int64: the place of each choice, N if it
    has none. `ends_B` int32: the end of each bin's places. `counts_B2` int64: the numbers of places and of choices
    of each bin.
    """

    tokens_N: Tensor
    choices_N: Tensor
    places_TK: Tensor
    ends_B: Tensor
    counts_B2: Tensor

    def copies(self, num_places: int) -> RowCopies:
        """The places as copies of the tokens; `num_places` is their number over all bins."""
        return RowCopies(self.tokens_N[:num_places], self.places_TK)

    def copies_of_choices(self, num_places: int) -> RowCopies:
        """The places as copies of the choices."""
        return RowCopies(self.choices_N[:num_places], self.places_TK.reshape(-1, 1))


def gather_rows(x_TD: Tensor, copies: RowCopies) -> Tensor:
    """One row for each copy: (X, D)."""
    return x_TD[copies.source_X]


def sum_rows(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
    """The sum of the copies of each row, 0 if it has none: (T, D), in the type of `rows_XD`.

    Sums are taken in float32 (float64 for float64), in the order of the slots, and rounded once.
    """
    if len(rows_XD) < slots_TM.numel():  # some slots are unused: they read a row of zeros
        rows_XD = torch.cat([rows_XD, rows_XD.new_zeros(1, rows_XD.shape[1])])
        slots_TM = slots_TM.clamp(max=len(rows_XD) - 1)
    wide = torch.promote_types(rows_XD.dtype, torch.float32)
    return rows_XD[slots_TM].sum(1, dtype=wide).to(rows_XD.dtype)


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts all choices by expert, and within an expert by token, without a host synchronisation."""
    narrow = torch.int16 if num_experts <= torch.iinfo(torch.int16).max else torch.int64  # a GPU sorts bit by bit
    sorted_X, choices_X = experts_TK.flatten().to(narrow).sort(stable=True)
    places_X = torch.arange(choices_X.numel(), device=choices_X.device)
    inverse_X = torch.empty_like(choices_X).scatter_(0, choices_X, places_X)
    experts_E = torch.arange(num_experts, device=choices_X.device, dtype=narrow)
    ends_E = torch.searchsorted(sorted_X, experts_E, right=True, out_int32=True)
    return ExpertOrder(choices_X, inverse_X.view_as(experts_TK), ends_E)


def sort_into_bins(experts_TK: Tensor, bins: ExpertBins, once: bool = False) -> BinOrder:
    """Sorts choices (T, K), integers, by bin, and within a bin by token; choices outside all bins have no place.

    With `once`, a token that chose several experts of a bin has one place there: that of the first of these
    choices.
    """
    offsets_TK = experts_TK.long() - bins.first
    inside_TK = (offsets_TK >= 0) & (offsets_TK < bins.number * bins.size)
    bins_TK = torch.where(inside_TK, offsets_TK // bins.size, bins.number)
    placed_TK = torch.where(_repeats_a_bin(bins_TK), bins.number, bins_TK) if once else bins_TK
    choices_N = placed_TK.flatten().argsort(stable=True)
    places_N = torch.empty_like(choices_N)
    places_N[choices_N] = torch.arange(choices_N.numel(), device=choices_N.device)
    places_TK = places_N.view_as(placed_TK).masked_fill(placed_TK == bins.number, choices_N.numel())
    counts_B2 = torch.stack([_counts(placed_TK, bins), _counts(bins_TK, bins)], dim=1)
    ends_B = counts_B2[:, 0].cumsum(0).int()
    return BinOrder(choices_N // max(1, experts_TK.shape[1]), choices_N, places_TK, ends_B, counts_B2)


def _repeats_a_bin(bins_TK: Tensor) -> Tensor:
    """Whether an earlier choice of the same token is in the same bin."""
    return (bins_TK[:, :, None] == bins_TK[:, None, :]).tril(-1).any(-1)


def _counts(bins_TK: Tensor, bins: ExpertBins) -> Tensor:
    return torch.bincount(bins_TK.flatten(), minlength=bins.number + 1)[:-1]

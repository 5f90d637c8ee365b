"""Moving token rows into expert order and back, in plain torch.

Axes: T tokens, K experts per token, X = T·K copies, D model width, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertOrder(NamedTuple):
    """How the copies of the tokens line up by expert.

    `order_X` int64: the place in the flattened (T, K) choice of each sorted copy; `inverse_X` its inverse;
    `ends_E` int32: where each expert's copies end.
    """

    order_X: Tensor
    inverse_X: Tensor
    ends_E: Tensor


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts the copies by expert, and within an expert by token; all on the tensor's own device."""
    narrow = torch.int16 if num_experts <= torch.iinfo(torch.int16).max else torch.int64  # a GPU sorts bit by bit
    sorted_X, order_X = experts_TK.flatten().to(narrow).sort(stable=True)
    places_X = torch.arange(order_X.numel(), device=order_X.device)
    inverse_X = torch.empty_like(order_X).scatter_(0, order_X, places_X)
    experts_E = torch.arange(num_experts, device=order_X.device, dtype=narrow)
    ends_E = torch.searchsorted(sorted_X, experts_E, right=True, out_int32=True)
    return ExpertOrder(order_X, inverse_X, ends_E)


def permute(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """A row for each copy of a token, in expert order; (X, D)."""
    copies = order.order_X.numel() // x_TD.shape[0]
    return x_TD[order.order_X // copies]


def unpermute(rows_XD: Tensor, order: ExpertOrder, num_tokens: int) -> Tensor:
    """Sums the copies of each token; (T, D)."""
    return rows_XD[order.inverse_X].unflatten(0, (num_tokens, -1)).sum(1)

"""Bringing tokens to their experts and the results back.

A dispatcher is an object that a layer holds; running on several ranks means holding another one, not a branch
in the layer. Axes: T tokens, K experts per token, X rows in expert order, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from deepseek_v3.ops.moe_permute import permute, sort_by_expert, unpermute

# rows_XD, gates_X, ends_E -> rows_XD
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Dispatcher(Protocol):
    """Runs every token through the experts chosen for it and sums the results."""

    def __call__(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
        """(T, D) tokens to (T, D) sums over the K experts of each token."""


class LocalDispatcher:
    """All experts are here: sort the copies by expert, run them, put them back and sum."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
        order = sort_by_expert(experts_TK, self.num_experts)
        gates_X = permute(gates_TK.view(-1, 1), order).squeeze(-1)
        rows_XD = experts(permute(x_TD, order), gates_X, order.ends_E)
        return unpermute(rows_XD, order, x_TD.shape[0])

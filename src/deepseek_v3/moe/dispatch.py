"""Bringing tokens to their experts and the results back, in DeepEP's terms.

A dispatcher is an object that a layer holds; running on several ranks means holding another one, not a branch in
the layer. `dispatch` sends the rows off, `receive` waits for those that have arrived; `combine` sends results back
and `collect` waits for them. What is computed between the two halves runs while rows travel. The backward pass of
dispatch is combine, and the other way round.

Axes: T tokens, K experts per token, R received rows, X rows in expert order, D width, E experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from deepseek_v3.ops.moe_permute import permute, sort_by_expert, unpermute


class Arrived(NamedTuple):
    """Rows for the experts of this rank: `rows_XD` in expert order, their gates, and where each expert's end.

    `ends_E` int32, not decreasing; the last one is the number of rows. `handle` belongs to `combine`.
    """

    rows_XD: Tensor
    gates_X: Tensor
    ends_E: Tensor
    handle: Any


class Dispatcher(Protocol):
    """Takes every token to the experts chosen for it, and the sum of their results back to it."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Any:
        """Sends (T, D) tokens to their experts; returns what `receive` takes."""

    def receive(self, sent: Any) -> Arrived:
        """What has come for the experts of this rank."""

    def combine(self, rows_XD: Tensor, handle: Any) -> Any:
        """Sends the experts' results back; returns what `collect` takes."""

    def collect(self, returned: Any) -> Tensor:
        """For each of the tokens that were sent off the sum over its experts: (T, D)."""


class LocalDispatcher:
    """All experts are here: sort the copies by expert, and afterwards put them back and sum."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Arrived:
        order = sort_by_expert(experts_TK, self.num_experts)
        gates_X = permute(gates_TK.view(-1, 1), order).squeeze(-1)
        return Arrived(permute(x_TD, order), gates_X, order.ends_E, (order, x_TD.shape[0]))

    def receive(self, sent: Arrived) -> Arrived:
        return sent

    def combine(self, rows_XD: Tensor, handle: Any) -> Tensor:
        order, num_tokens = handle
        return unpermute(rows_XD, order, num_tokens)

    def collect(self, returned: Tensor) -> Tensor:
        return returned

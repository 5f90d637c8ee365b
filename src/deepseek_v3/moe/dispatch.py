"""Dispatching tokens to their experts and combining the results, in DeepEP's terms.

A layer holds a dispatcher object. To run on several ranks, the layer holds another dispatcher; it has no branch for
that. Each direction has two halves: `dispatch` sends the tokens and `wait_dispatch` waits for the tokens of
this rank's experts; `combine` sends the results back and `wait_combine` waits for them. Whatever the layer computes
between two halves overlaps with the communication. The backward pass of a dispatch is a combine, and that of a
combine is a dispatch.

Axes: T tokens, K experts per token, X rows in expert order, D width, E experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from deepseek_v3.ops.moe_permute import RowCopies, gather_rows, sort_by_expert, sum_rows


class DispatchedTokens(NamedTuple):
    """Rows for the experts of this rank: `rows_XD` in expert order, one gate per row, and the end of each expert.

    `ends_E` int32, not decreasing: expert e has the rows ends[e-1] … ends[e]-1; the last entry is X. `handle` is
    the argument that `combine` needs to send the results back.
    """

    rows_XD: Tensor
    gates_X: Tensor
    ends_E: Tensor
    handle: Any


class Dispatcher(Protocol):
    """Brings every token to the experts chosen for it, and brings back the sum of their results."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Any:
        """Sends tokens (T, D) to their experts; returns the argument of `wait_dispatch`."""

    def wait_dispatch(self, sent: Any) -> DispatchedTokens:
        """Waits for the tokens that all ranks have sent to the experts of this rank."""

    def combine(self, rows_XD: Tensor, handle: Any) -> Any:
        """Sends the results of the experts back; returns the argument of `wait_combine`."""

    def wait_combine(self, returned: Any) -> Tensor:
        """Waits for the results; returns, for each token passed to `dispatch`, the sum over its experts (T, D)."""


class LocalDispatcher:
    """The dispatcher of a rank that has all experts: it sorts rows by expert, and later restores their order.

    It always uses the reference back end of `moe_permute`, which torch.compile fuses with the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> DispatchedTokens:
        order = sort_by_expert(experts_TK, self.num_experts)
        copies = order.copies()
        gates_X = gather_rows(gates_TK.view(-1, 1), order.copies_of_choices()).squeeze(-1)
        return DispatchedTokens(gather_rows(x_TD, copies), gates_X, order.ends_E, copies)

    def wait_dispatch(self, sent: DispatchedTokens) -> DispatchedTokens:
        return sent

    def combine(self, rows_XD: Tensor, handle: RowCopies) -> Tensor:
        return sum_rows(rows_XD, handle)

    def wait_combine(self, returned: Tensor) -> Tensor:
        return returned

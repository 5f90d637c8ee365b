"""Dispatching tokens to their experts and combining the results, in DeepEP's terms.

A layer holds a dispatcher object. To run on several ranks, the layer holds another dispatcher; it has no branch for
that. Each direction has two halves: `dispatch` sends the tokens and `wait_dispatch` waits for the tokens of
this rank's experts; `combine` sends the results back and `wait_combine` waits for them. Whatever the layer computes
between two halves overlaps with the communication. The backward pass of a dispatch is a combine, and that of a
combine is a dispatch.

Axes: T tokens, R received tokens, K experts per token, X rows in expert order, D width, E experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from deepseek_v3.ops.fp8 import RowBlocks
from deepseek_v3.ops.moe_permute import RowCopies, gather_rows, sort_by_expert


class Fp8Tokens(NamedTuple):
    """Tokens that arrived in FP8: `rows` (R, D), which have no gradient, and a stand-in that has it.

    `stand_in_RD` has the shape and the type that the tokens had before they were sent, no memory of its own, and
    undefined values. Its gradient is that of the tokens.
    """

    stand_in_RD: Tensor
    rows: RowBlocks


class DispatchedTokens(NamedTuple):
    """The tokens `x_RD` that this rank's experts receive, and which expert each of them is for.

    The experts compute X rows, one for each pair of a received token and an expert of this rank, in the order of
    the experts: `copies` says of which token each row is a copy, and `gates_X` float32 is the gate of each row.
    `ends_E` int32, not decreasing: expert e has the rows ends[e-1] … ends[e]-1; the last entry is X. `handle` is
    the argument that `combine` needs to send the results back.
    """

    x_RD: Tensor | Fp8Tokens
    gates_X: Tensor
    copies: RowCopies
    ends_E: Tensor
    handle: Any


class Dispatcher(Protocol):
    """Brings every token to the experts chosen for it, and brings back the sum of their results."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Any:
        """Sends tokens (T, D) to their experts; returns the argument of `wait_dispatch`."""

    def wait_dispatch(self, sent: Any) -> DispatchedTokens:
        """Waits for the tokens that all ranks have sent to the experts of this rank."""

    def combine(self, y_RD: Tensor, handle: Any) -> Any:
        """Sends back, for each received token, the sum over this rank's experts; the argument of `wait_combine`."""

    def wait_combine(self, returned: Any) -> Tensor:
        """Waits for the results; returns, for each token passed to `dispatch`, the sum over its experts (T, D)."""


class LocalDispatcher:
    """The dispatcher of a rank that has all experts: tokens stay where they are, and are sorted by expert.

    It always sorts with the reference back end of `moe_permute`, which torch.compile fuses with the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> DispatchedTokens:
        order = sort_by_expert(experts_TK, self.num_experts)
        gates_X = gather_rows(gates_TK.view(-1, 1), order.copies_of_choices()).squeeze(-1)
        return DispatchedTokens(x_TD, gates_X, order.copies(), order.ends_E, handle=None)

    def wait_dispatch(self, sent: DispatchedTokens) -> DispatchedTokens:
        return sent

    def combine(self, y_RD: Tensor, handle: None) -> Tensor:  # noqa: ARG002 -- the interface of a dispatcher
        return y_RD

    def wait_combine(self, returned: Tensor) -> Tensor:
        return returned

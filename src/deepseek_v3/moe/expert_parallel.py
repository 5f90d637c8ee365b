"""Dispatching tokens to experts on other ranks: the part that every communication back end shares.

An exchange of rows between ranks is two autograd nodes, `start_exchange` and `wait_exchange`. Whatever the layer
computes between the two overlaps with the exchange. Autograd runs later nodes first, so the backward pass of
`wait_exchange` starts the exchange of the gradients, then autograd differentiates what was computed in between,
then the backward pass of `start_exchange` waits for the gradients.

Axes: T tokens, R received tokens, K experts per token, X rows in expert order, D width, E experts of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.moe.dispatch import DispatchedTokens, Fp8Tokens
from deepseek_v3.ops.fp8 import Fp8Quantize, RowBlocks, dequantize_1x128
from deepseek_v3.ops.moe_permute import ExpertBins, MoePermute, gather_rows, reference


class AsyncExchange(Protocol):
    """An exchange of rows between ranks, and the exchange of their gradients in the opposite direction.

    Each method may be called once per pass, in the order in which they are listed here.
    """

    def start(self, *tensors: Tensor) -> None:
        """Sends the rows of this rank."""

    def wait(self) -> tuple[Tensor, ...]:
        """Waits for the rows that this rank receives."""

    def start_backward(self, *gradients: Tensor) -> None:
        """Sends the gradients of the tensors that `wait` returned."""

    def wait_backward(self) -> tuple[Tensor | None, ...]:
        """Waits for the gradients of the tensors that `start` sent; None for integer tensors."""


def start_exchange(exchange: AsyncExchange, *tensors: Tensor) -> Tensor:
    """Starts an exchange; returns an empty tensor, the order token that `wait_exchange` needs.

    The order token makes the second node depend on the first one in autograd's graph.
    """
    return _StartExchange.apply(exchange, *tensors)


def wait_exchange(exchange: AsyncExchange, order_token: Tensor) -> tuple[Tensor, ...]:
    """Waits for an exchange and returns the received tensors."""
    return _WaitExchange.apply(exchange, order_token)


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: AsyncExchange, *tensors: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.start(*tensors)
        return tensors[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.wait_backward()


class _WaitExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: AsyncExchange, order_token: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.start_backward(*gradients)
        return None, gradients[0].new_zeros(0)


class Fp8Dispatch(NamedTuple):
    """How tokens travel to their experts in FP8: what quantizes them, and in which form the experts receive them.

    With `hands_over` the experts receive 8-bit rows, which they multiply as they are; otherwise the rows are
    dequantized when they arrive.
    """

    quantize: Fp8Quantize
    power_of_two: bool = False
    hands_over: bool = False

    def rows_of(self, x_TD: Tensor) -> RowBlocks:
        """The rows that are sent."""
        return self.quantize.quantize_rows(x_TD, self.power_of_two)

    def received(self, rows: RowBlocks, dtype: torch.dtype) -> tuple[Tensor, RowBlocks | None]:
        """What carries the gradient of received rows, (R, D) in `dtype`, and the rows that are handed over."""
        if not self.hands_over:
            return dequantize_1x128(*rows, dtype), None
        stand_in = rows.scales_XG.new_empty((), dtype=dtype).expand(rows.values_XD.shape)
        return stand_in, RowBlocks(rows.values_XD.contiguous(), rows.scales_XG.contiguous())


class DispatchExchange(AsyncExchange, Protocol):
    """Sends tokens (T, D), gates (T, K) and expert numbers (T, K) int64 to the ranks that hold the experts.

    A rank receives each token at most once, with all of its K gates and expert numbers, also those of other ranks.
    """

    @property
    def first_expert(self) -> int:
        """The number of this rank's first expert in the received expert numbers; its other experts follow."""

    @property
    def num_copies(self) -> int:
        """The number of (token, expert) pairs of the received tokens with an expert of this rank: X."""

    def take_fp8_rows(self) -> RowBlocks | None:
        """The received rows if they are handed over in FP8: after `wait`, once. They pass by autograd."""

    def combine_exchange(self) -> AsyncExchange:
        """The exchange that sends one row (R, D) per received token back, and returns their sums (T, D)."""


class ExpertParallelDispatcher(ABC):
    """A `Dispatcher` for experts that are sharded over the ranks of a group, consecutive experts on each rank.

    The experts of this rank sum their results for each received token in float32 before they are sent back; the
    rank that sent the token sums over the ranks, again in float32. `permute` is the back end that sorts the
    received tokens by expert, and sums rows and gates.
    """

    def __init__(self, num_local_experts: int, permute: MoePermute = reference) -> None:
        self.num_local_experts, self.permute = num_local_experts, permute

    @abstractmethod
    def _dispatch_exchange(self, experts_TK: Tensor) -> DispatchExchange:
        """A new exchange for tokens that chose these experts."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> tuple[DispatchExchange, Tensor]:
        """Sends tokens to the ranks that hold their experts."""
        exchange = self._dispatch_exchange(experts_TK)
        return exchange, start_exchange(exchange, x_TD, gates_TK, experts_TK)

    def wait_dispatch(self, sent: tuple[DispatchExchange, Tensor]) -> DispatchedTokens:
        """Waits for the tokens of all ranks and sorts them by expert."""
        exchange, order_token = sent
        x_RD, gates_RK, experts_RK = wait_exchange(exchange, order_token)
        bins = ExpertBins(exchange.first_expert, 1, self.num_local_experts)
        order, num_copies = self.permute.sort_into_bins(experts_RK, bins), exchange.num_copies
        copies, copies_of_choices = order.copies(num_copies), order.copies_of_choices(num_copies)
        gates_X = gather_rows(gates_RK.reshape(-1, 1), copies_of_choices, self.permute).squeeze(1)
        rows = exchange.take_fp8_rows()
        tokens = x_RD if rows is None else Fp8Tokens(x_RD, rows)
        return DispatchedTokens(tokens, gates_X, copies, order.ends_B, handle=exchange)

    def combine(self, y_RD: Tensor, handle: DispatchExchange) -> tuple[AsyncExchange, Tensor]:
        """Sends the sums over this rank's experts back to the ranks of their tokens."""
        exchange = handle.combine_exchange()
        return exchange, start_exchange(exchange, y_RD)

    def wait_combine(self, returned: tuple[AsyncExchange, Tensor]) -> Tensor:
        """Waits for the sums over all experts of each of this rank's tokens; (T, D)."""
        return wait_exchange(*returned)[0]

"""What all ways to experts on other ranks have in common.

Axes: T tokens, R received tokens, K experts per token, X rows in expert order, D width, E experts of this rank.


FOLDED: Moving rows between ranks as two nodes of autograd, one that starts and one that waits.

Whatever is computed between the two runs while rows travel. Autograd runs the latest node first, so the backward
pass meets the same two in the other order: the one that waited starts the way back, then comes the gradient of what
was computed in between, then the one that started waits.

"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.moe.dispatch import Arrived
from deepseek_v3.ops.moe_permute import Bins, Copies, line_up, spread, sum_copies


class Crossing(Protocol):
    """Rows on their way between ranks: one way in the forward pass, back in the backward pass.

    Each of the four may be called once in a pass, in this order.
    """

    def start(self, *tensors: Tensor) -> None:
        """Sends rows off."""

    def finish(self) -> tuple[Tensor, ...]:
        """Waits for the rows that have been sent here."""

    def start_back(self, *gradients: Tensor) -> None:
        """Sends the gradients of what `finish` returned off."""

    def finish_back(self) -> tuple[Tensor | None, ...]:
        """Waits for the gradients of what `start` took; None for whole numbers."""


def depart(crossing: Crossing, *tensors: Tensor) -> Tensor:
    """Starts a crossing; returns a ticket, an empty tensor that ties the two halves together."""
    return _Depart.apply(crossing, *tensors)


def arrive(crossing: Crossing, ticket: Tensor) -> tuple[Tensor, ...]:
    """Waits for what has crossed."""
    return _Arrive.apply(crossing, ticket)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *tensors: Tensor) -> Tensor:
        ctx.crossing = crossing
        crossing.start(*tensors)
        return tensors[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.crossing.finish_back()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, ticket: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 -- ties the halves
        ctx.crossing = crossing
        return crossing.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.crossing.start_back(*gradients)
        return None, gradients[0].new_zeros(0)


class Dispatching(Crossing, Protocol):
    """The way of tokens (T, D), gates (T, K) and chosen experts (T, K) int64 to the ranks that hold these experts.

    Each token arrives once, with its gates and experts, of which some may be other ranks'.
    """

    @property
    def first_expert(self) -> int:
        """The number by which arriving tokens name this rank's first expert; the others follow."""

    @property
    def num_copies(self) -> int:
        """How many experts of this rank the tokens that have arrived chose."""

    def combining(self) -> Crossing:
        """The way back, of one row (R, D) for each token that has arrived, to sums (T, D)."""


class Handle(NamedTuple):
    """How to get back: the way that tokens came, and which rows are copies of which of them."""

    dispatching: Dispatching
    copies: Copies


class RemoteDispatcher(ABC):
    """A `Dispatcher` to experts that lie in equal runs on the ranks of a group.

    Each received token is copied to its experts here; their results are summed in float32 before they go back, and
    once more where they come home.
    """

    def __init__(self, num_local_experts: int) -> None:
        self.num_local_experts = num_local_experts

    @abstractmethod
    def _dispatching(self, experts_TK: Tensor) -> Dispatching:
        """The way of tokens that chose these experts."""

    def dispatch(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> tuple[Dispatching, Tensor]:
        """Sends tokens off to the ranks that hold their experts."""
        dispatching = self._dispatching(experts_TK)
        return dispatching, depart(dispatching, x_TD, gates_TK, experts_TK)

    def receive(self, sent: tuple[Dispatching, Tensor]) -> Arrived:
        """Waits for the tokens of all ranks for experts of this one."""
        dispatching, ticket = sent
        rows_RD, gates_RK, experts_RK = arrive(dispatching, ticket)
        bins = Bins(dispatching.first_expert, 1, self.num_local_experts)
        order, number = line_up(experts_RK, bins), dispatching.num_copies
        copies = order.copies(number)
        gates_X = spread(gates_RK.reshape(-1, 1), order.copies_of_choices(number)).squeeze(1)
        return Arrived(spread(rows_RD, copies), gates_X, order.ends_B, Handle(dispatching, copies))

    def combine(self, rows_XD: Tensor, handle: Handle) -> tuple[Crossing, Tensor]:
        """Sends one row for each received token back to where it came from."""
        combining = handle.dispatching.combining()
        return combining, depart(combining, sum_copies(rows_XD, handle.copies))

    def collect(self, returned: tuple[Crossing, Tensor]) -> Tensor:
        """Waits for the sums over all experts of this rank's tokens; (T, D)."""
        return arrive(*returned)[0]

"""What all ways to experts on other ranks have in common.

Axes: T tokens, R received tokens, K experts per token, X rows in expert order, D width, E experts of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

from torch import Tensor

from deepseek_v3.moe.deepep.crossing import Crossing, arrive, depart
from deepseek_v3.moe.dispatch import Arrived
from deepseek_v3.ops.moe_permute import Bins, Copies, line_up, spread, sum_copies


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

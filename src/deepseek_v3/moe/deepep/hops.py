"""The steps on which tokens go to the ranks of their experts, and what moves on each.

Axes: T tokens, K experts per token, R received rows, D width, P ranks of a hop, C counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.moe.deepep.payload import Flight, columns_of, pack, unpack
from deepseek_v3.ops.moe_permute import Bins, Copies, line_up, sum_copies
from deepseek_v3.utils.errors import ConfigError


class Leg(NamedTuple):
    """A hop as certain tokens take it: which go where, and how many rows to and from each rank of the group.

    `num_copies` is how many experts of the received tokens lie ahead.
    """

    group: dist.ProcessGroup
    copies: Copies
    sent: list[int]
    received: list[int]
    num_copies: int

    def outward(self, rows_TD: Tensor) -> Flight:
        """Sends a copy of each token to each rank that it goes to; rows (R, D) arrive."""
        return Flight(rows_TD[self.copies.source_X], self.sent, self.received, self.group)

    def homeward(self, parts_RD: Sequence[Tensor]) -> Homecoming:
        """Sends rows (R, D) back; their sums (T, D) arrive."""
        return Homecoming(self, parts_RD)


class Homecoming:
    """Rows on their way back over one leg."""

    def __init__(self, leg: Leg, parts_RD: Sequence[Tensor]) -> None:
        self._columns, self._copies = columns_of(parts_RD), leg.copies
        self._flight = Flight(pack(parts_RD), leg.received, leg.sent, leg.group)

    def land(self) -> list[Tensor]:
        """Waits, and sums the rows of each token in float32."""
        return [sum_copies(part, self._copies) for part in unpack(self._flight.land(), self._columns)]


class Hop(NamedTuple):
    """One step: to any of so many `ranks` of a group, `stride` apart, of whom this rank is one."""

    group: dist.ProcessGroup
    ranks: int
    stride: int = 1

    def leg(self, experts_TK: Tensor, num_experts: int) -> Leg:
        """The step as tokens take it that chose these of so many experts. Exchanges counts and waits for them."""
        runs, run = self._runs()
        size = num_experts // (runs * self.ranks)
        order = line_up(experts_TK, Bins(run * self.ranks * size, size, self.ranks), once=True)
        going, coming = self._exchanged(order.counts_B2)
        copies = order.copies(sum(rows for rows, _ in going))
        num_copies = sum(experts for _, experts in coming)
        sent, received = (self._by_rank([rows for rows, _ in counts]) for counts in (going, coming))
        return Leg(self.group, copies, sent, received, num_copies)

    def _runs(self) -> tuple[int, int]:
        """How many runs of ranks there are that no token leaves on this hop, and which one this rank is in."""
        size = self.ranks * self.stride
        return self.group.size() // size, self.group.rank() // size

    def _by_rank(self, counts_P: list[int]) -> list[int]:
        """Counts for each rank of the group, 0 for those that the hop does not reach."""
        first = self._runs()[1] * self.ranks * self.stride + self.group.rank() % self.stride
        counts = [0] * self.group.size()
        for place, count in enumerate(counts_P):
            counts[first + place * self.stride] = count
        return counts

    def _exchanged(self, going_PC: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Counts for each rank of the hop, and those of each for this one; the two are read in one go."""
        coming_PC = torch.empty_like(going_PC)
        one_each = self._by_rank([1] * self.ranks)
        dist.all_to_all_single(coming_PC, going_PC, one_each, one_each, group=self.group)
        going, coming = torch.stack([going_PC, coming_PC]).tolist()
        return going, coming


def hops(group: dist.ProcessGroup, ranks_per_node: int | None = None) -> list[Hop]:
    """The way to any rank of a group: in one hop, or between nodes and then within one.

    Consecutive ranks are a node. Raises ConfigError where the group does not consist of whole nodes.
    """
    ranks = group.size()
    if ranks_per_node is None or ranks_per_node == 1 or ranks_per_node >= ranks:
        return [Hop(group, ranks)]
    if ranks_per_node < 1 or ranks % ranks_per_node:
        raise ConfigError(
            f"parallel.expert = {ranks} ranks are no whole number of nodes of {ranks_per_node}; "
            "choose a degree that is a multiple or a divisor of the ranks of a node"
        )
    return [Hop(group, ranks // ranks_per_node, stride=ranks_per_node), Hop(group, ranks_per_node)]

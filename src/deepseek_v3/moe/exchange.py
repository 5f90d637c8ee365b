"""The steps on which tokens go to the ranks of their experts, and what moves on each.

Axes: T tokens, K experts per token, R received rows, D width, P ranks of a hop, C counts.


FOLDED: Rows of several tensors as one, and their exchange in one collective.

The exchange is one of bytes: the back ends of torch.distributed take different number formats, and gloo neither
8-bit floats nor 16-bit integers.

"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.ops.moe_permute import Bins, Copies, line_up, sum_copies
from deepseek_v3.utils.errors import ConfigError

_WORD = torch.int64  # rows are copied in words; every tensor begins at one


class Columns(NamedTuple):
    """The columns of one tensor among others."""

    dtype: torch.dtype
    width: int

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def num_words(self) -> int:
        return -(-self.num_bytes // _WORD.itemsize)


def columns_of(parts: Sequence[Tensor]) -> list[Columns]:
    """The columns of tensors (rows, width) with equally many rows, in order."""
    return [Columns(part.dtype, part.shape[1]) for part in parts]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (rows, width) side by side, (rows, words) int64; one alone stays as it is."""
    if len(parts) == 1:
        return parts[0]
    columns = columns_of(parts)
    packed = torch.empty(len(parts[0]), sum(c.num_words for c in columns), dtype=_WORD, device=parts[0].device)
    for place, part in zip(unpack(packed, columns), parts, strict=True):
        place.copy_(part)
    return packed


def unpack(packed: Tensor, columns: Sequence[Columns]) -> list[Tensor]:
    """The tensors again, as views."""
    if len(columns) == 1:
        return [packed]
    places = packed.view(torch.uint8).split([c.num_words * _WORD.itemsize for c in columns], dim=1)
    return [place[:, : c.num_bytes].view(c.dtype) for place, c in zip(places, columns, strict=True)]


class Flight:
    """Rows on their way through one collective: how many go to each rank of the group, and come from it."""

    def __init__(self, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(received), rows.shape[1])
        work = dist.all_to_all_single(
            arriving.view(torch.uint8), rows.view(torch.uint8), received, sent, group=group, async_op=True
        )
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = work, rows, arriving

    def land(self) -> Tensor:
        """Waits, once, for what has been sent here. On a GPU it is the current stream that waits."""
        assert self._under_way is not None
        work, _, arriving = self._under_way
        work.wait()
        self._under_way = None  # what was sent needs to be kept no longer
        return arriving


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

"""All-to-all exchanges of token rows between the ranks of a group, in one step, or between nodes and then within.

Several tensors with one row per token are packed into one tensor of bytes and exchanged in one collective: the back
ends of torch.distributed support different number formats, and gloo supports neither 8-bit floats nor 16-bit
integers.

Axes: T tokens, K experts per token, R received rows, D width, P ranks that a step reaches, C counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.ops.moe_permute import ExpertBins, MoePermute, RowCopies, reference
from deepseek_v3.utils.errors import ConfigError

_WORD = torch.int64  # rows are copied in words; every packed tensor begins at a word


class Field(NamedTuple):
    """The type and width of one tensor in a packed row."""

    dtype: torch.dtype
    width: int

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def num_words(self) -> int:
        return -(-self.num_bytes // _WORD.itemsize)


def fields_of(tensors: Sequence[Tensor]) -> list[Field]:
    """The fields of tensors (rows, width) with the same number of rows, in order."""
    return [Field(tensor.dtype, tensor.shape[1]) for tensor in tensors]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Packs tensors (rows, width) side by side into (rows, words) int64; a single tensor is returned unchanged."""
    if len(tensors) == 1:
        return tensors[0]
    fields = fields_of(tensors)
    num_words = sum(field.num_words for field in fields)
    packed = torch.empty(len(tensors[0]), num_words, dtype=_WORD, device=tensors[0].device)
    for view, tensor in zip(unpack(packed, fields), tensors, strict=True):
        view.copy_(tensor)
    return packed


def unpack(packed: Tensor, fields: Sequence[Field]) -> list[Tensor]:
    """The packed tensors, as views of `packed`."""
    if len(fields) == 1:
        return [packed]
    columns = packed.view(torch.uint8).split([field.num_words * _WORD.itemsize for field in fields], dim=1)
    return [column[:, : field.num_bytes].view(field.dtype) for column, field in zip(columns, fields, strict=True)]


class AsyncAllToAll:
    """One all-to-all of rows that is under way.

    `num_sent` and `num_received` say how many rows this rank sends to and receives from each rank of the group.
    """

    def __init__(
        self, rows: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup
    ) -> None:
        rows = rows.contiguous()
        received = rows.new_empty(sum(num_received), rows.shape[1])
        work = dist.all_to_all_single(
            received.view(torch.uint8), rows.view(torch.uint8), num_received, num_sent, group=group, async_op=True
        )
        self._pending: tuple[dist.Work, Tensor, Tensor] | None = work, rows, received

    def wait(self) -> Tensor:
        """Waits for the received rows and returns them. May be called once. On a GPU the current stream waits."""
        assert self._pending is not None
        work, _, received = self._pending
        work.wait()
        self._pending = None  # frees the rows that were sent
        return received


class RoutingPlan(NamedTuple):
    """Which tokens an exchange step sends to which rank, and how many rows each rank sends and receives.

    `num_copies` is the number of (token, expert) pairs of the received rows whose expert is in the range of experts
    that the step brings them to: the experts of this rank after the last step. `permute` is the back end that sorts
    and sums rows within a rank.
    """

    group: dist.ProcessGroup
    copies: RowCopies
    num_sent: list[int]
    num_received: list[int]
    num_copies: int
    permute: MoePermute

    def send(self, rows_TD: Tensor) -> AsyncAllToAll:
        """Starts to send one copy of each token to each of its ranks; `wait` returns the received rows (R, D)."""
        return AsyncAllToAll(rows_TD[self.copies.source_X], self.num_sent, self.num_received, self.group)

    def send_back(self, tensors_RD: Sequence[Tensor]) -> ReturnHandle:
        """Starts to send one row per received token back; `wait` returns the sums (T, D) of each token's rows."""
        return ReturnHandle(self, tensors_RD)


class ReturnHandle:
    """Rows that are being sent back over one exchange step."""

    def __init__(self, plan: RoutingPlan, tensors_RD: Sequence[Tensor]) -> None:
        self._fields, self._slots_TM, self._permute = fields_of(tensors_RD), plan.copies.slots_TM, plan.permute
        self._all_to_all = AsyncAllToAll(pack(tensors_RD), plan.num_received, plan.num_sent, plan.group)

    def wait(self) -> list[Tensor]:
        """Waits for the rows, and sums those of each token in float32."""
        tensors_RD = unpack(self._all_to_all.wait(), self._fields)
        return [self._permute.sum_rows(rows_RD, self._slots_TM) for rows_RD in tensors_RD]


class ExchangeStep(NamedTuple):
    """One step on the way to an expert: it reaches `num_ranks` ranks that are `stride` apart, this rank among them.

    With two steps, the first reaches the same local rank of each node (stride = ranks per node), and the
    second reaches the ranks of this node (stride = 1).
    """

    group: dist.ProcessGroup
    num_ranks: int
    stride: int = 1

    def plan(self, experts_TK: Tensor, num_experts: int, permute: MoePermute = reference) -> RoutingPlan:
        """Plans this step for tokens that chose these of `num_experts` experts. Exchanges the counts and waits."""
        num_blocks, block = self._blocks()
        size = num_experts // (num_blocks * self.num_ranks)
        bins = ExpertBins(block * self.num_ranks * size, size, self.num_ranks)
        order = permute.sort_into_bins(experts_TK, bins, once=True)
        sent, received = self._exchange_counts(order.counts_B2)
        copies = order.copies(sum(rows for rows, _ in sent))
        num_copies = sum(experts for _, experts in received)
        num_sent, num_received = (self._by_rank([rows for rows, _ in counts]) for counts in (sent, received))
        return RoutingPlan(self.group, copies, num_sent, num_received, num_copies, permute)

    def _blocks(self) -> tuple[int, int]:
        """The number of blocks of ranks within which this step sends tokens, and this rank's block."""
        size = self.num_ranks * self.stride
        return self.group.size() // size, self.group.rank() // size

    def _by_rank(self, counts_P: list[int]) -> list[int]:
        """Counts for each rank of the group: 0 for the ranks that this step does not reach."""
        first = self._blocks()[1] * self.num_ranks * self.stride + self.group.rank() % self.stride
        counts = [0] * self.group.size()
        for index, count in enumerate(counts_P):
            counts[first + index * self.stride] = count
        return counts

    def _exchange_counts(self, sent_PC: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The counts for each rank of the step and those from each rank, copied to the host in one transfer."""
        received_PC = torch.empty_like(sent_PC)
        one_each = self._by_rank([1] * self.num_ranks)
        dist.all_to_all_single(received_PC, sent_PC, one_each, one_each, group=self.group)
        sent, received = torch.stack([sent_PC, received_PC]).tolist()
        return sent, received


def exchange_steps(group: dist.ProcessGroup, ranks_per_node: int | None = None) -> list[ExchangeStep]:
    """The steps that bring a token to any rank of a group: one step, or one between nodes and one within the node.

    A node is `ranks_per_node` consecutive ranks. Raises ConfigError if the group is not a whole number of nodes.
    """
    num_ranks = group.size()
    if ranks_per_node is None or ranks_per_node == 1 or ranks_per_node >= num_ranks:
        return [ExchangeStep(group, num_ranks)]
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise ConfigError(
            f"parallel.expert = {num_ranks} ranks are not a whole number of nodes of {ranks_per_node}; "
            "choose a degree that is a multiple or a divisor of the ranks of a node"
        )
    return [
        ExchangeStep(group, num_ranks // ranks_per_node, stride=ranks_per_node),
        ExchangeStep(group, ranks_per_node),
    ]

"""Fakes of the two buffers of the DeepEP library, with its signatures and rules, over gloo.

Every rank gathers the data that all ranks send and selects its own. The tensors that a call returns hold NaN until
its event is waited for, like memory that a kernel has not written yet.
"""

# ruff: noqa: ARG002, ARG004 -- the signatures are the library's

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.moe.deepep import BufferShape, DeepEPDispatcher, ElasticBuffer, LegacyBuffer
from helpers.experts import Case, run_this_rank

NOT_CHOSEN = -1


class Event:
    """`EventOverlap`: results appear when the current stream waits."""

    def __init__(self, appear: Callable[[], None] = lambda: None) -> None:
        self.appear = appear

    def current_stream_wait(self) -> None:
        self.appear()


class Network:
    """The exchange that both buffers run, between the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def dispatch(self, rows: list[Tensor], experts_TK: Tensor, gates_TK: Tensor | None, num_experts: int) -> Any:
        """Rows, experts and gates for this rank, the count of each expert, and the (rank, token) of each row."""
        size = num_experts // self.ranks
        sent = self._gathered(([part.view(torch.uint8) for part in rows], experts_TK, gates_TK))
        goes_here = [(experts_TK // size == self.rank).any(1) for _, experts_TK, _ in sent]
        places = [(rank, int(token)) for rank, mask in enumerate(goes_here) for token in mask.nonzero()]

        def arriving(parts: list[Tensor]) -> Tensor:
            return torch.cat([part[mask] for part, mask in zip(parts, goes_here, strict=True)])

        arriving_rows = [arriving([there[0][i] for there in sent]).view(part.dtype) for i, part in enumerate(rows)]
        experts_RK = arriving([there[1] for there in sent]) - self.rank * size
        experts_RK[(experts_RK < 0) | (experts_RK >= size)] = NOT_CHOSEN
        counts = [int((experts_RK == expert).sum()) for expert in range(size)]
        gates_RK = None
        if gates_TK is not None:
            gates_RK = arriving([there[2] for there in sent]).where(experts_RK != NOT_CHOSEN, 0)
        return arriving_rows, experts_RK, gates_RK, counts, places

    def combine(self, values: Tensor, places: list[tuple[int, int]], tokens: int) -> Tensor:
        """For each token of this rank, the sum of the rows that all ranks hold for it, in float32."""
        sums = torch.zeros(tokens, values.shape[1])
        for others, their_places in self._gathered((values, places)):
            for value, (rank, token) in zip(others, their_places, strict=True):
                if rank == self.rank:
                    sums[token] += value.float()
        return sums.to(values.dtype)

    def _gathered(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.ranks
        dist.all_gather_object(things, thing, self.group)
        return things


def later(*results: Tensor | None) -> tuple[list[Any], Event]:
    """Tensors for the results, and the event that writes the results to them."""
    memory = [None if r is None else torch.empty(r.shape, dtype=r.dtype) for r in results]
    for place in memory:
        if place is not None:
            place.view(torch.uint8).fill_(255)

    def appear() -> None:
        for place, result in zip(memory, results, strict=True):
            if place is not None and result is not None:
                place.copy_(result)

    return memory, Event(appear)


def check_rows(x: Any, width: int | None = None) -> list[Tensor]:
    """The rows and scales of `x`, which must be contiguous bfloat16, or e4m3 with a float32 scale per 128."""
    rows, scales = x if isinstance(x, tuple) else (x, None)
    assert rows.is_contiguous()
    assert width is None or rows.shape[1] == width
    if scales is None:
        assert rows.dtype == torch.bfloat16
        return [rows]
    assert rows.dtype == torch.float8_e4m3fn
    assert (scales.dtype, scales.shape) == (torch.float32, (len(rows), rows.shape[1] // 128))
    return [rows, scales]


def unpacked(parts: list[Any]) -> Any:
    return tuple(parts) if len(parts) > 1 else parts[0]


class FakeConfig:
    """`deep_ep.Config`."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class FakeBuffer:
    """`deep_ep.Buffer`."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        self.wire, self.hidden_bytes = Network(group), num_nvl_bytes // group.size()

    @staticmethod
    def capture() -> Event:
        return Event()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> FakeConfig:
        return FakeConfig()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert topk_idx.dtype == torch.int64
        assert async_finish
        assert isinstance(previous_event, Event)
        is_in_rank = torch.zeros(len(topk_idx), self.wire.ranks, dtype=torch.bool)
        is_in_rank.scatter_(1, topk_idx // (num_experts // self.wire.ranks), True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        results, event = later(is_in_rank.sum(0).int(), per_expert, is_in_rank)
        return results[0], None, results[1], results[2], event

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert async_finish
        assert allocate_on_comm_stream
        assert isinstance(previous_event, Event)
        rows = check_rows(x, self.hidden_bytes // 2)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            sent_experts, num_experts, _ = handle
            arriving, *_ = self.wire.dispatch(rows, sent_experts, None, num_experts)
            results, event = later(*arriving)
            return unpacked(results), None, None, None, None, event
        previous_event.current_stream_wait()
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert torch.equal(num_tokens_per_rank.long(), is_token_in_rank.sum(0))
        assert num_tokens_per_expert.sum() == topk_idx.numel()
        num_experts = len(num_tokens_per_expert)
        arriving, experts, gates, counts, places = self.wire.dispatch(rows, topk_idx, topk_weights, num_experts)
        (experts, gates, *received), event = later(experts, gates, *arriving)
        handle = (topk_idx.clone(), num_experts, places)
        return unpacked(received), experts, gates, counts, handle, event

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Any = None,
        previous_event: Event | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert async_finish
        assert isinstance(previous_event, Event)
        return combined(self.wire, check_rows(x)[0], topk_weights, handle[2], len(handle[0]))


def combined(wire: Network, x: Tensor, weights: Tensor | None, places: Any, tokens: int) -> Any:
    assert len(x) == len(places)
    sums = wire.combine(x, places, tokens)
    weight_sums = None
    if weights is not None:
        assert weights.dtype == torch.float32
        weight_sums = wire.combine(weights, places, tokens)
    results, event = later(sums, weight_sums)
    return *results, event


class FakeElasticBuffer:
    """`deep_ep.ElasticBuffer`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.wire, self.most, self.hidden, self.num_topk = Network(group), num_max_tokens_per_rank, hidden, num_topk
        self.num_sms = 20  # as long as nobody asks for an estimate

    @staticmethod
    def capture() -> Event:
        return Event()

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_topk == self.num_topk
        self.num_sms = 6
        return 6

    def dispatch(
        self,
        x: Any,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Any = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Any:
        assert num_sms == self.num_sms
        assert async_with_compute_stream
        assert allocate_on_comm_stream
        assert isinstance(previous_event, Event)
        rows = check_rows(x, self.hidden)
        assert len(rows[0]) <= self.most
        if handle is not None:
            assert topk_idx is None
            arriving, *_ = self.wire.dispatch(rows, handle.topk_idx, None, handle.num_experts)
            results, event = later(*arriving)
            return unpacked(results), None, None, handle, event
        assert num_experts is not None
        assert topk_idx is not None
        assert topk_idx.dtype == torch.int64
        assert topk_weights is None or topk_weights.dtype == torch.float32
        arriving, experts, gates, counts, places = self.wire.dispatch(rows, topk_idx, topk_weights, num_experts)
        (experts, gates, *received), event = later(experts, gates, *arriving)
        handle = SimpleNamespace(
            topk_idx=topk_idx.clone(),
            num_experts=num_experts,
            num_recv_tokens_per_expert_list=counts,
            places=places,
        )
        return unpacked(received), experts, gates, handle, event

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        assert async_with_compute_stream
        assert allocate_on_comm_stream
        assert isinstance(previous_event, Event)
        return combined(self.wire, check_rows(x)[0], topk_weights, handle.places, len(handle.topk_idx))


def run_this_rank_with_deepep(case: Case, generation: str) -> dict[str, Tensor]:
    """The results of this rank, with tokens dispatched and combined by a fake of one of DeepEP's buffers."""
    config = case.layers()[0].config
    in_groups = config.topk_group < config.n_group
    shape = BufferShape(max(case.lengths), config.hidden_size, config.num_experts_per_tok, case.dtype, in_groups)
    library = ModuleType("deep_ep")
    library.Buffer, library.ElasticBuffer = FakeBuffer, FakeElasticBuffer
    kind = {"Buffer": LegacyBuffer, "ElasticBuffer": ElasticBuffer}[generation]
    buffer = kind(library, config.n_routed_experts, dist.group.WORLD, shape)
    return run_this_rank(
        case, DeepEPDispatcher(config.n_routed_experts // dist.get_world_size(), buffer, case.fp8_dispatch)
    )

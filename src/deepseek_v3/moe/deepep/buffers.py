"""The two generations of DeepEP's buffers (https://github.com/deepseek-ai/DeepEP) behind one interface.

Written against their documentation and tested with stand-ins of the same signatures. **This has been run neither
with the library itself nor on its hardware.**

DeepEP's kernels run on a stream of their own: they begin after an event of the current stream, which goes on
meanwhile and waits for an event of theirs before it reads what they wrote.

Axes: T tokens, R received tokens, K experts per token, D width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

# A bfloat16 tensor, or one of 8 bits and its scales.
Rows = Tensor | tuple[Tensor, Tensor]


# SMs that carry rows where the library has no estimate: DeepSeek-V3's own number, report section 3.2.2.
_SMS_FOR_GROUPS = 20


class CannotRunError(Exception):
    """Why DeepEP is of no use here."""


class Traffic(NamedTuple):
    """What a rank sends in one layer: at most `tokens` of this width and type, each to `experts_per_token`.

    `in_groups` says that the experts of a token lie in a few groups only (`topk_group` below `n_group`), so that
    fewer ranks and nodes are reached than by a free choice.
    """

    tokens: int
    width: int
    experts_per_token: int
    dtype: torch.dtype
    in_groups: bool = False


class Landing(NamedTuple):
    """Tokens that are being sent here; to be read only after `event`. Experts are numbered from 0 on each rank."""

    rows: Rows
    gates_RK: Tensor
    experts_RK: Tensor
    num_copies: int
    handle: Any
    event: Any


class Buffer(Protocol):
    """What the generations of DeepEP have in common; each call returns an event to wait for."""

    name: str

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> Landing:
        """Sends tokens to the ranks of their experts."""

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        """Sends other rows the same way."""

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Sends rows back, to the sums over all ranks; gates likewise."""


@final
class FirstGeneration:
    """`deep_ep.Buffer`, which asks for the layout before each dispatch."""

    name = "Buffer"

    def __init__(self, deep_ep: ModuleType, num_experts: int, group: dist.ProcessGroup, traffic: Traffic) -> None:
        ranks, row_bytes = group.size(), traffic.width * traffic.dtype.itemsize
        kind = deep_ep.Buffer
        try:
            configs = [kind.get_dispatch_config(ranks), kind.get_combine_config(ranks)]
        except AssertionError as error:
            raise CannotRunError(f"its Buffer has no configuration for {ranks} ranks") from error
        nvlink_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        self._buffer = kind(group, nvlink_bytes, rdma_bytes)
        self._num_experts = num_experts

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> Landing:
        per_rank, per_node, per_expert, is_in_rank, laid_out = self._buffer.get_dispatch_layout(
            experts_TK, self._num_experts, **self._after_this()
        )
        arriving, experts_RK, gates_RK, counts, handle, event = self._buffer.dispatch(
            rows,
            topk_idx=experts_TK,
            topk_weights=gates_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_in_rank,
            **self._after_this() | {"previous_event": laid_out},
        )
        return Landing(arriving, gates_RK, experts_RK, sum(counts), handle, event)

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        arriving, *_, event = self._buffer.dispatch(rows_TD, handle=handle, **self._after_this())
        return arriving, event

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        return self._buffer.combine(rows_RD, handle, topk_weights=gates_RK, **self._after_this())

    def _after_this(self) -> dict[str, Any]:
        """Begin after what the current stream has been given, and let it go on meanwhile."""
        return {"previous_event": self._buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}


@final
class SecondGeneration:
    """`deep_ep.ElasticBuffer`, made for a largest number of tokens."""

    name = "ElasticBuffer"

    def __init__(self, deep_ep: ModuleType, num_experts: int, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self._buffer = deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=traffic.tokens,
            hidden=traffic.width,
            num_topk=traffic.experts_per_token,
            use_fp8_dispatch=False,  # this is but the size, and gradients are dispatched in bfloat16
            deterministic=True,  # a layer that is computed again must find its tokens in the same order
        )
        self._num_experts = num_experts
        if traffic.in_groups:  # the library's estimate is documented as not for group-limited gates
            self._num_sms = _SMS_FOR_GROUPS
        else:
            self._num_sms = self._buffer.get_theoretical_num_sms(num_experts, traffic.experts_per_token)

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> Landing:
        arriving, experts_RK, gates_RK, handle, event = self._buffer.dispatch(
            rows, topk_idx=experts_TK, topk_weights=gates_TK, num_experts=self._num_experts, **self._after_this()
        )
        num_copies = sum(handle.num_recv_tokens_per_expert_list)
        return Landing(arriving, gates_RK, experts_RK, num_copies, handle, event)

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        arriving, *_, event = self._buffer.dispatch(rows_TD, handle=handle, **self._after_this())
        return arriving, event

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        return self._buffer.combine(rows_RD, handle=handle, topk_weights=gates_RK, **self._after_this())

    def _after_this(self) -> dict[str, Any]:
        """Begin after what the current stream has been given, and let it go on meanwhile."""
        return {
            "num_sms": self._num_sms,
            "previous_event": self._buffer.capture(),
            "async_with_compute_stream": True,
            "allocate_on_comm_stream": True,
        }

"""Experts on several ranks, reached through the DeepEP library.

It finds the nodes by itself, and sends a token once to each. See `buffers.py` for what was run of it.

Axes: T tokens, R received tokens, K experts per token, D width.


FOLDED: The two generations of DeepEP's buffers (https://github.com/deepseek-ai/DeepEP) behind one interface.

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

from deepseek_v3.moe.expert_parallel import RemoteDispatcher
from deepseek_v3.ops.fp8 import dequantize_1x128, quantize_1x128

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


@final
class DeepEPDispatcher(RemoteDispatcher):
    """Reaches experts through a buffer of DeepEP; with `fp8`, rows travel to them in 8 bits."""

    def __init__(self, num_local_experts: int, buffer: Buffer, fp8: bool = False) -> None:
        super().__init__(num_local_experts)
        self._buffer, self._fp8 = buffer, fp8

    def _dispatching(self, experts_TK: Tensor) -> _Dispatching:  # noqa: ARG002 -- the library lays out as it sends
        return _Dispatching(self._buffer, self._fp8)


class _Kernels:
    """Kernels on DeepEP's stream: what they write, and what they read and must therefore be kept."""

    def __init__(self, event: Any, written: tuple[Any, ...], read: tuple[Any, ...]) -> None:
        self._event, self._written, self._read = event, written, read

    def finished(self) -> tuple[Any, ...]:
        """Lets the current stream wait, once, for what they write."""
        self._event.current_stream_wait()
        written = self._written
        del self._event, self._written, self._read
        return written


class _Dispatching:
    """Tokens on their way to experts, a dispatch; the way back of their gradients is a combine."""

    first_expert = 0  # the library numbers the experts of each rank from 0, and names others -1

    def __init__(self, buffer: Buffer, fp8: bool) -> None:
        self._buffer, self._fp8 = buffer, fp8
        self.num_copies = 0

    def start(self, *tensors: Tensor) -> None:
        x_TD, gates_TK, experts_TK = (tensor.contiguous() for tensor in tensors)
        self._dtype = x_TD.dtype
        sent = (quantize_1x128(x_TD) if self._fp8 else x_TD, gates_TK, experts_TK)
        landing = self._buffer.dispatch(*sent)
        self._handle, self.num_copies = landing.handle, landing.num_copies
        arriving = (landing.rows, landing.gates_RK, landing.experts_RK)
        self._kernels = _Kernels(landing.event, arriving, sent)

    def finish(self) -> tuple[Tensor, ...]:
        rows, gates_RK, experts_RK = self._kernels.finished()
        if self._fp8:
            rows = dequantize_1x128(rows[0], rows[1], self._dtype)
        return rows, gates_RK, experts_RK

    def start_back(self, *gradients: Tensor) -> None:
        rows_RD, gates_RK = (gradient.contiguous() for gradient in gradients[:2])
        *arriving, event = self._buffer.combine(rows_RD, self._handle, gates_RK)
        self._kernels = _Kernels(event, tuple(arriving), (rows_RD, gates_RK))

    def finish_back(self) -> tuple[Tensor | None, ...]:
        return *self._kernels.finished(), None

    def combining(self) -> _Combining:
        return _Combining(self._buffer, self._handle)


class _Combining:
    """Results on their way back, a combine; the way of their gradients is the same dispatch again."""

    def __init__(self, buffer: Buffer, handle: Any) -> None:
        self._buffer, self._handle = buffer, handle

    def start(self, *tensors: Tensor) -> None:
        rows_RD = tensors[0].contiguous()
        combined_TD, _, event = self._buffer.combine(rows_RD, self._handle)
        self._kernels = _Kernels(event, (combined_TD,), (rows_RD,))

    def finish(self) -> tuple[Tensor, ...]:
        return self._kernels.finished()

    def start_back(self, *gradients: Tensor) -> None:
        rows_TD = gradients[0].contiguous()
        arriving_RD, event = self._buffer.dispatch_again(rows_TD, self._handle)
        self._kernels = _Kernels(event, (arriving_RD,), (rows_TD,))

    def finish_back(self) -> tuple[Tensor, ...]:
        return self._kernels.finished()

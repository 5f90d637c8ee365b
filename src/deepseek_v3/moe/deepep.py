"""Expert parallelism through DeepEP (https://github.com/deepseek-ai/DeepEP), for both generations of its buffers.

DeepEP finds the nodes by itself and sends a token once to each of them. Its kernels run on a separate stream:
they begin after an event of the current stream. That stream continues with other work, and waits for an event of
theirs before it reads their outputs.

This module is written against DeepEP's documentation and tested with stand-ins of the same signatures. **It has
been run neither with the library itself nor on its hardware.**

Axes: T tokens, R received tokens, K experts per token, D width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.moe.expert_parallel import ExpertParallelDispatcher, Fp8Dispatch
from deepseek_v3.ops.fp8 import RowBlocks
from deepseek_v3.ops.moe_permute import MoePermute, reference

# A bfloat16 tensor, or an e4m3 tensor and its scales.
Rows = Tensor | tuple[Tensor, Tensor]

# SMs that run the exchange if the library has no estimate: DeepSeek-V3's own number (report, section 3.2.2).
_SMS_FOR_GROUP_LIMITED_GATES = 20


class CannotRunError(Exception):
    """DeepEP cannot run here; the message says why."""


class BufferShape(NamedTuple):
    """The most that a rank sends in a layer: `tokens` rows of `width` numbers, each to `experts_per_token` experts.

    `in_groups` says that the experts of a token are in few groups (`topk_group` is below `n_group`): its rows then
    go to fewer ranks and nodes than with a free choice.
    """

    tokens: int
    width: int
    experts_per_token: int
    dtype: torch.dtype
    in_groups: bool = False


class DispatchResult(NamedTuple):
    """Tokens that this rank receives; they may be read only after `event`. Each rank numbers its experts from 0."""

    rows: Rows
    gates_RK: Tensor
    experts_RK: Tensor
    num_copies: int
    handle: Any
    event: Any


class Buffer(Protocol):
    """The interface of both generations of DeepEP; each call returns an event to wait for."""

    name: str

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> DispatchResult:
        """Sends tokens to the ranks of their experts."""

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        """Sends other rows of the same tokens to the same ranks."""

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Sends one row per received token back, and gates likewise; returns their sums over all ranks."""


@final
class LegacyBuffer:
    """`deep_ep.Buffer` (V1), which must be asked for the dispatch layout before each dispatch."""

    name = "Buffer"

    def __init__(self, deep_ep: ModuleType, num_experts: int, group: dist.ProcessGroup, shape: BufferShape) -> None:
        num_ranks, row_bytes = group.size(), shape.width * shape.dtype.itemsize
        buffer_class = deep_ep.Buffer
        try:
            configs = [buffer_class.get_dispatch_config(num_ranks), buffer_class.get_combine_config(num_ranks)]
        except AssertionError as error:
            raise CannotRunError(f"its Buffer has no configuration for {num_ranks} ranks") from error
        nvlink_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, num_ranks) for config in configs)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, num_ranks) for config in configs)
        self._buffer = buffer_class(group, nvlink_bytes, rdma_bytes)
        self._num_experts = num_experts

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> DispatchResult:
        per_rank, per_node, per_expert, is_in_rank, layout_event = self._buffer.get_dispatch_layout(
            experts_TK, self._num_experts, **self._async_options()
        )
        received, experts_RK, gates_RK, counts, handle, event = self._buffer.dispatch(
            rows,
            topk_idx=experts_TK,
            topk_weights=gates_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_in_rank,
            **self._async_options() | {"previous_event": layout_event},
        )
        return DispatchResult(received, gates_RK, experts_RK, sum(counts), handle, event)

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        received, *_, event = self._buffer.dispatch(rows_TD, handle=handle, **self._async_options())
        return received, event

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        return self._buffer.combine(rows_RD, handle, topk_weights=gates_RK, **self._async_options())

    def _async_options(self) -> dict[str, Any]:
        """Starts the kernels after all work queued on the current stream, which does not wait for them."""
        return {"previous_event": self._buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}


@final
class ElasticBuffer:
    """`deep_ep.ElasticBuffer` (V2), which is allocated for a largest number of tokens."""

    name = "ElasticBuffer"

    def __init__(self, deep_ep: ModuleType, num_experts: int, group: dist.ProcessGroup, shape: BufferShape) -> None:
        self._buffer = deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=shape.tokens,
            hidden=shape.width,
            num_topk=shape.experts_per_token,
            use_fp8_dispatch=False,  # only sets the buffer's size, and gradients are dispatched in bfloat16
            deterministic=True,  # under recomputation, a layer must receive its tokens in the same order again
        )
        self._num_experts = num_experts
        if shape.in_groups:  # the library documents that its estimate does not hold for group-limited gates
            self._num_sms = _SMS_FOR_GROUP_LIMITED_GATES
        else:
            self._num_sms = self._buffer.get_theoretical_num_sms(num_experts, shape.experts_per_token)

    def dispatch(self, rows: Rows, gates_TK: Tensor, experts_TK: Tensor) -> DispatchResult:
        received, experts_RK, gates_RK, handle, event = self._buffer.dispatch(
            rows,
            topk_idx=experts_TK,
            topk_weights=gates_TK,
            num_experts=self._num_experts,
            **self._async_options(),
        )
        num_copies = sum(handle.num_recv_tokens_per_expert_list)
        return DispatchResult(received, gates_RK, experts_RK, num_copies, handle, event)

    def dispatch_again(self, rows_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        received, *_, event = self._buffer.dispatch(rows_TD, handle=handle, **self._async_options())
        return received, event

    def combine(self, rows_RD: Tensor, handle: Any, gates_RK: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        return self._buffer.combine(rows_RD, handle=handle, topk_weights=gates_RK, **self._async_options())

    def _async_options(self) -> dict[str, Any]:
        """Starts the kernels after all work queued on the current stream, which does not wait for them."""
        return {
            "num_sms": self._num_sms,
            "previous_event": self._buffer.capture(),
            "async_with_compute_stream": True,
            "allocate_on_comm_stream": True,
        }


@final
class DeepEPDispatcher(ExpertParallelDispatcher):
    """Reaches experts through a buffer of DeepEP. With `fp8`, dispatched rows are sent as e4m3."""

    def __init__(
        self,
        num_local_experts: int,
        buffer: Buffer,
        fp8: Fp8Dispatch | None = None,
        permute: MoePermute = reference,
    ) -> None:
        super().__init__(num_local_experts, permute)
        self._buffer, self._fp8 = buffer, fp8

    def _dispatch_exchange(self, experts_TK: Tensor) -> _DispatchExchange:  # noqa: ARG002 -- DeepEP plans as it sends
        return _DispatchExchange(self._buffer, self._fp8)


class _PendingKernels:
    """Kernels on DeepEP's stream, with their outputs, and with their inputs, which must not be freed earlier."""

    def __init__(self, event: Any, outputs: tuple[Any, ...], inputs: tuple[Any, ...]) -> None:
        self._event, self._outputs, self._inputs = event, outputs, inputs

    def wait(self) -> tuple[Any, ...]:
        """Lets the current stream wait for the outputs and returns them. May be called once."""
        self._event.current_stream_wait()
        outputs = self._outputs
        del self._event, self._outputs, self._inputs
        return outputs


class _DispatchExchange:
    """Sends tokens to their experts, a dispatch; in the backward pass sends gradients back, a combine."""

    # DeepEP numbers the experts of each rank from 0, and gives experts of other ranks the number -1.
    first_expert = 0

    def __init__(self, buffer: Buffer, fp8: Fp8Dispatch | None) -> None:
        self._buffer, self._fp8 = buffer, fp8
        self._fp8_rows: RowBlocks | None = None
        self.num_copies = 0

    def start(self, *tensors: Tensor) -> None:
        x_TD, gates_TK, experts_TK = (tensor.contiguous() for tensor in tensors)
        self._dtype = x_TD.dtype
        rows: Rows = x_TD
        if self._fp8 is not None:
            values_TD, scales_TG = self._fp8.rows_of(x_TD)
            rows = (values_TD, scales_TG)
        sent = (rows, gates_TK, experts_TK)
        result = self._buffer.dispatch(*sent)
        self._handle, self.num_copies = result.handle, result.num_copies
        received = (result.rows, result.gates_RK, result.experts_RK)
        self._pending = _PendingKernels(result.event, received, sent)

    def wait(self) -> tuple[Tensor, ...]:
        rows, gates_RK, experts_RK = self._pending.wait()
        if self._fp8 is not None:
            rows, self._fp8_rows = self._fp8.received(RowBlocks(*rows), self._dtype)
        return rows, gates_RK, experts_RK

    def take_fp8_rows(self) -> RowBlocks | None:
        rows, self._fp8_rows = self._fp8_rows, None
        return rows

    def start_backward(self, *gradients: Tensor) -> None:
        rows_RD, gates_RK = (gradient.contiguous() for gradient in gradients[:2])
        *received, event = self._buffer.combine(rows_RD, self._handle, gates_RK)
        self._pending = _PendingKernels(event, tuple(received), (rows_RD, gates_RK))

    def wait_backward(self) -> tuple[Tensor | None, ...]:
        return *self._pending.wait(), None

    def combine_exchange(self) -> _CombineExchange:
        return _CombineExchange(self._buffer, self._handle)


class _CombineExchange:
    """Sends results back, a combine; in the backward pass dispatches their gradients to the same ranks."""

    def __init__(self, buffer: Buffer, handle: Any) -> None:
        self._buffer, self._handle = buffer, handle

    def start(self, *tensors: Tensor) -> None:
        rows_RD = tensors[0].contiguous()
        combined_TD, _, event = self._buffer.combine(rows_RD, self._handle)
        self._pending = _PendingKernels(event, (combined_TD,), (rows_RD,))

    def wait(self) -> tuple[Tensor, ...]:
        return self._pending.wait()

    def start_backward(self, *gradients: Tensor) -> None:
        rows_TD = gradients[0].contiguous()
        received_RD, event = self._buffer.dispatch_again(rows_TD, self._handle)
        self._pending = _PendingKernels(event, (received_RD,), (rows_TD,))

    def wait_backward(self) -> tuple[Tensor, ...]:
        return self._pending.wait()

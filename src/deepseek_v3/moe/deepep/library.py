"""Experts on several ranks, reached through the DeepEP library.

It finds the nodes by itself, and sends a token once to each. See `buffers.py` for what was run of it.

Axes: T tokens, R received tokens, K experts per token, D width.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from deepseek_v3.moe.deepep.buffers import Buffer
from deepseek_v3.moe.deepep.remote import RemoteDispatcher
from deepseek_v3.ops.fp8 import dequantize_1x128, quantize_1x128


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

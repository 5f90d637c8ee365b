"""Matrices in 8-bit floating point (e4m3) with one scale per block, and the operation that quantizes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import reference
from deepseek_v3.ops.fp8.formats import (
    BLOCK,
    E4M3,
    ColumnBlocks,
    RowBlocks,
    WeightBlocks,
    group_starts,
    padded_places,
)
from deepseek_v3.ops.fp8.reference import (
    dequantize_1x128,
    dequantize_128x128,
    dequantize_columns,
    dequantize_weight,
    quantize_1x128,
    quantize_128x128,
)
from deepseek_v3.ops.nvrtc import nvrtc_obstacle
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = [
    "BLOCK",
    "E4M3",
    "FP8_QUANTIZE",
    "ColumnBlocks",
    "Fp8Quantize",
    "RowBlocks",
    "WeightBlocks",
    "dequantize_1x128",
    "dequantize_128x128",
    "dequantize_columns",
    "dequantize_weight",
    "group_starts",
    "padded_places",
    "quantize_1x128",
    "quantize_128x128",
]


class Fp8Quantize(Protocol):
    """The interface of a back end, as `reference.py` defines it. Its functions have no gradients."""

    def quantize_rows(self, x_TD: Tensor, power_of_two: bool) -> RowBlocks: ...

    def quantize_columns(self, x_TD: Tensor, power_of_two: bool) -> ColumnBlocks: ...

    def quantize_both(self, x_TD: Tensor, power_of_two: bool) -> tuple[RowBlocks, ColumnBlocks]: ...

    def gather_rows(self, rows: RowBlocks, source_X: Tensor) -> RowBlocks: ...

    def gather_columns(
        self, x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool
    ) -> ColumnBlocks: ...

    def requantize_columns(
        self, rows: RowBlocks, source_X: Tensor, ends_E: Tensor, power_of_two: bool, dtype: torch.dtype
    ) -> ColumnBlocks: ...

    def quantize_weight(self, w_EOI: Tensor, power_of_two: bool) -> tuple[WeightBlocks, WeightBlocks]: ...

    def swiglu(
        self, gate_up_XG2: Tensor, gates_X: Tensor | None, power_of_two: bool
    ) -> tuple[RowBlocks, RowBlocks]: ...

    def swiglu_backward(
        self,
        kept: RowBlocks,
        grad_hidden_XF: Tensor,
        gates_X: Tensor | None,
        ends_E: Tensor | None,
        power_of_two: bool,
    ) -> tuple[RowBlocks, ColumnBlocks, ColumnBlocks, Tensor | None]: ...


def _cuda() -> Fp8Quantize:
    from deepseek_v3.ops.fp8 import cuda

    return cuda


def _cuda_obstacle(target: Target) -> str | None:
    obstacle = triton_obstacle(target)  # whose kernels do the rest
    if obstacle:
        return obstacle
    if torch.cuda.get_device_capability(target.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    from deepseek_v3.ops.fp8 import cuda

    return nvrtc_obstacle(cuda.kernels())


def _triton() -> Fp8Quantize:
    from deepseek_v3.ops.fp8 import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    obstacle = triton_obstacle(target)
    if obstacle is None and torch.cuda.get_device_capability(target.device) < (8, 9):
        return "needs a GPU that converts to e4m3 (compute capability 8.9)"
    return obstacle


FP8_QUANTIZE: Operation[Fp8Quantize] = Operation(
    "fp8_quantize",
    Backend("cuda", _cuda, _cuda_obstacle),
    Backend("triton", _triton, _triton_obstacle),
    Backend("reference", lambda: reference),
)

"""The matrix products of FP8 training: of a dense layer, or of routed experts, one weight per group of rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.fp8_gemm import reference
from deepseek_v3.ops.nvrtc import nvrtc_obstacle
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = ["FP8_GEMM", "Fp8Gemm", "reference"]

_SHARED_KIB = 128  # that Triton's largest tile takes for operands in flight


class Fp8Gemm(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def rows_product(
        self, a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor: ...

    def columns_product(
        self,
        a: ColumnBlocks,
        b: ColumnBlocks,
        ends_E: Tensor | None,
        num_rows: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor: ...


def _cuda() -> Fp8Gemm:
    from deepseek_v3.ops.fp8_gemm import cuda

    return cuda


def _cuda_obstacle(target: Target) -> str | None:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    if any(width % 16 for width in target.widths):
        return "needs row widths that are multiples of 16"
    if torch.cuda.get_device_capability(target.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    from deepseek_v3.ops.fp8_gemm import cuda

    return nvrtc_obstacle(cuda.kernels())


def _triton() -> Fp8Gemm:
    from deepseek_v3.ops.fp8_gemm import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    if any(width % 16 for width in target.widths):
        return "needs row widths that are multiples of 16"
    obstacle = triton_obstacle(target)
    if obstacle is not None:
        return obstacle
    if torch.cuda.get_device_capability(target.device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or newer"
    if torch.cuda.get_device_properties(target.device).shared_memory_per_multiprocessor <= 1024 * _SHARED_KIB:
        return f"needs a GPU with more than {_SHARED_KIB} KiB of shared memory"
    return None


# The widths of its target are those of the rows, before and after every product; its dtype is that of the results.
FP8_GEMM: Operation[Fp8Gemm] = Operation(
    "fp8_gemm",
    Backend("cuda", _cuda, _cuda_obstacle),
    Backend("triton", _triton, _triton_obstacle),
    Backend("reference", lambda: reference),
)

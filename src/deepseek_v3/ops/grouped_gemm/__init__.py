"""The matrix products of routed experts: one weight per group of rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.grouped_gemm import cuda
from deepseek_v3.ops.grouped_gemm.reference import grouped_linear as reference_grouped_linear
from deepseek_v3.ops.grouped_gemm.torch_grouped import grouped_linear as torch_grouped_linear
from deepseek_v3.ops.grouped_gemm.wide_gradient import grouped_linear as wide_gradient_grouped_linear
from deepseek_v3.ops.nvrtc import nvrtc_obstacle
from deepseek_v3.ops.operation import Backend, Operation, Target

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = [
    "GROUPED_GEMM",
    "GroupedLinear",
    "reference_grouped_linear",
    "torch_grouped_linear",
    "wide_gradient_grouped_linear",
]


def _torch_obstacle(target: Target) -> str | None:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    if target.dtype != torch.bfloat16:
        return "needs bfloat16"
    if any(width % 8 for width in target.widths):
        return "needs row widths that are multiples of 8"
    return None


def _cuda_obstacle(target: Target) -> str | None:
    obstacle = _torch_obstacle(target)
    if obstacle is not None:
        return obstacle
    if torch.cuda.get_device_capability(target.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return nvrtc_obstacle(cuda.kernels())


# The widths of its target are those of the rows, before and after every product.
GROUPED_GEMM: Operation[GroupedLinear] = Operation(
    "grouped_gemm",
    Backend("cuda", lambda: wide_gradient_grouped_linear, _cuda_obstacle),
    Backend("torch", lambda: torch_grouped_linear, _torch_obstacle),
    Backend("reference", lambda: reference_grouped_linear),
)

"""The gated activation of dense layers and experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle
from deepseek_v3.ops.swiglu.reference import packed_swiglu, swiglu

PackedSwiGLU = Callable[[Tensor, Tensor], Tensor]

__all__ = ["SWIGLU", "PackedSwiGLU", "packed_swiglu", "swiglu"]


def _triton() -> PackedSwiGLU:
    from deepseek_v3.ops.swiglu import triton

    return triton.packed_swiglu


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    return triton_obstacle(target)


# The activation of the experts. Where gate and up are two tensors, the compiler's kernels for `swiglu` move no more
# than they must.
SWIGLU: Operation[PackedSwiGLU] = Operation(
    "swiglu", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: packed_swiglu)
)

"""The places of the largest numbers of each row."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle
from deepseek_v3.ops.top_k.reference import top_k

TopK = Callable[[Tensor, int], Tensor]

__all__ = ["TOP_K", "TopK", "top_k"]

_MOST_COLUMNS = 4096  # that one program of the kernel compares at once


def _triton() -> TopK:
    from deepseek_v3.ops.top_k import triton

    return triton.top_k


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype == torch.float64:
        return "needs float32"
    if any(width > _MOST_COLUMNS for width in target.widths):
        return f"needs rows of at most {_MOST_COLUMNS} numbers"
    return triton_obstacle(target)


TOP_K: Operation[TopK] = Operation(
    "top_k", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: top_k)
)

"""Rotary position embedding, alone and together with the heads that it belongs to."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle
from deepseek_v3.ops.rotary.reference import join_heads, rotate

JoinHeads = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

__all__ = ["ROTARY", "JoinHeads", "join_heads", "rotate"]


def _triton() -> JoinHeads:
    from deepseek_v3.ops.rotary import triton

    return triton.join_heads


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    return triton_obstacle(target)


ROTARY: Operation[JoinHeads] = Operation(
    "rotary", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: join_heads)
)

"""Causal attention for training, with keys and values of every head."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.attention.reference import attention as reference_attention
from deepseek_v3.ops.attention.sdpa import attention as sdpa_attention
from deepseek_v3.ops.attention.sdpa import cudnn_attention
from deepseek_v3.ops.operation import Backend, Operation, Target

Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

__all__ = ["ATTENTION", "Attention", "cudnn_attention", "reference_attention", "sdpa_attention"]


def _cudnn_obstacle(target: Target) -> str | None:
    if target.device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(target.device) < (9, 0):
        return "needs a Hopper GPU or a newer one"
    if target.dtype not in (torch.bfloat16, torch.float16):
        return "needs bfloat16 or float16"
    if any(width % 8 for width in target.widths):
        return "needs head widths that are multiples of 8"
    return None


# The widths of its target are those of queries and keys, and of values.
ATTENTION: Operation[Attention] = Operation(
    "attention",
    Backend("cudnn", lambda: cudnn_attention, _cudnn_obstacle),
    Backend("sdpa", lambda: sdpa_attention),
    Backend("reference", lambda: reference_attention),
)

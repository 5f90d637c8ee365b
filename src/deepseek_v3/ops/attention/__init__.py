"""Causal attention for training, keys and values expanded."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.attention.reference import attention as reference_attention
from deepseek_v3.ops.attention.sdpa import attention as sdpa_attention
from deepseek_v3.ops.attention.sdpa import cudnn_attention

Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

__all__ = ["Attention", "cudnn_attention", "fastest_attention", "reference_attention", "sdpa_attention"]


def fastest_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """The back end to use: cuDNN for half precision on Hopper and newer, torch's own choice elsewhere."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (9, 0):
        return cudnn_attention
    return sdpa_attention

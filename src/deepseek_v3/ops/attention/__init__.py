"""Causal attention for training, keys and values expanded."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.attention.reference import attention as reference_attention
from deepseek_v3.ops.attention.sdpa import attention as sdpa_attention
from deepseek_v3.ops.attention.sdpa import cudnn_attention

Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

__all__ = ["Attention", "cudnn_attention", "fastest_attention", "reference_attention", "sdpa_attention"]


def fastest_attention(device: torch.device, dtype: torch.dtype, qk_width: int, v_width: int) -> Attention:
    """The back end for heads of these widths: cuDNN for half precision on Hopper and newer, else torch's choice."""
    fits_cudnn = dtype in (torch.bfloat16, torch.float16) and qk_width % 8 == v_width % 8 == 0
    if device.type == "cuda" and fits_cudnn and torch.cuda.get_device_capability(device) >= (9, 0):
        return cudnn_attention
    return sdpa_attention

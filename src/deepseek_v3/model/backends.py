"""Which implementation of each operation a model runs, chosen once for all its layers.

FOLDED: The number format of the computation; weights stay float32 and follow the activations' type.
"""

from __future__ import annotations

from typing import Literal

import torch

from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.attention import fastest_attention
from deepseek_v3.ops.grouped_gemm import fastest_grouped_linear
from deepseek_v3.utils.errors import ConfigError


def choose_backends(model: DeepSeekV3, device: torch.device) -> str:
    """Sets the fastest that suits the device and the model's `compute_dtype`; returns their names for a log."""
    dtype = model.compute_dtype or torch.float32
    config = model.config
    attention = fastest_attention(device, dtype, config.qk_head_dim, config.v_head_dim)
    grouped_linear = fastest_grouped_linear(device, dtype, config.hidden_size, config.moe_intermediate_size)
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.attend = attention
        elif isinstance(module, RoutedExperts):
            module.grouped_linear = grouped_linear
    return ", ".join(f"{op.__module__.split('.ops.')[1]}.{op.__name__}" for op in (attention, grouped_linear))


def compute_dtype(precision: Literal["auto", "bfloat16", "float32"], device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the GPU multiplies it natively and float32 elsewhere.

    Raises ConfigError where bfloat16 is asked of a GPU that lacks it.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bfloat16" and device.type == "cuda" and not native:
        raise ConfigError(
            f"parallel.precision = bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16 units; "
            "use --set parallel.precision=float32"
        )
    if precision == "auto":
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32

"""The number format of the computation; weights stay float32 and follow the activations' type."""

from __future__ import annotations

from typing import Literal

import torch

from deepseek_v3.utils.errors import ConfigError


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

"""Released weights in FP8: an e4m3 matrix `<name>` and its scales `<name>_scale_inv`, one per 128×128 block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, E4M3, dequantize_128x128


def scales_name(name: str) -> str:
    """The name of the scales of an FP8 weight."""
    return f"{name}_scale_inv"


def released_values(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The values of a released tensor: FP8 weights times their scales, in float32; other tensors unchanged."""
    tensor = tensors[name]
    return dequantize_128x128(tensor, tensors[scales_name(name)], torch.float32) if tensor.dtype == E4M3 else tensor


def scales_problems(name: str, weight: Tensor, scales: Tensor | None) -> Iterator[str]:
    """What keeps an FP8 weight from being dequantized with these scales."""
    if weight.ndim != 2:
        found = f"type {type_name(weight.dtype)} and shape {tuple(weight.shape)}"
        yield f"{name}: found {found}, expected FP8 for matrices only"
        return
    shape = tuple(-(-size // BLOCK) for size in weight.shape)
    if scales is None:
        yield (
            f"{name}: is in FP8 without {scales_name(name)}, expected its scales, one per {BLOCK}×{BLOCK} block; "
            "load them with the weights, or convert these to bfloat16 first"
        )
    elif tuple(scales.shape) != shape:
        found = f"shape {tuple(scales.shape)}"
        yield f"{scales_name(name)}: found {found}, expected {shape} for blocks of {BLOCK}×{BLOCK}"
    elif not scales.is_floating_point() or scales.is_meta:
        found = f"type {type_name(scales.dtype)} on {scales.device}"
        yield f"{scales_name(name)}: found {found}, expected values of a float type"


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

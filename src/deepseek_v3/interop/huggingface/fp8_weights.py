"""Released weights in FP8: an e4m3 matrix `<name>` and its scales `<name>_scale_inv`, one per 128×128 block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from deepseek_v3.ops.fp8 import BLOCK, E4M3
from deepseek_v3.utils.checkpointing.checks import TensorInfo

# What the released checkpoint has in FP8: the projections of the attention and of every feed-forward network, in
# the MTP layers too. Embedding, head, norms, gates and `eh_proj` stay in bfloat16, the routing biases in float32.
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
)

# The `quantization_config` of a config.json for such weights.
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_quantized(name: str) -> bool:
    """Whether the released checkpoint holds the tensor of this released name in FP8."""
    return _QUANTIZED.fullmatch(name) is not None


def scales_name(name: str) -> str:
    """The name of the scales of an FP8 weight."""
    return f"{name}_scale_inv"


def scales_problems(name: str, weight: TensorInfo, scales: TensorInfo | None) -> Iterator[str]:
    """What keeps an FP8 weight, a matrix or a stack of matrices, from being dequantized with these scales."""
    if len(weight.shape) < 2:
        found = f"type {type_name(weight.dtype)} and shape {weight.shape}"
        yield f"{name}: found {found}, expected FP8 for matrices only"
        return
    *stack, rows, columns = weight.shape
    shape = (*stack, -(-rows // BLOCK), -(-columns // BLOCK))
    if scales is None:
        yield (
            f"{name}: is in FP8 without {scales_name(name)}, expected its scales, one per {BLOCK}×{BLOCK} block; "
            "load them with the weights, or convert these to bfloat16 first"
        )
    elif scales.shape != shape:
        found = f"shape {scales.shape}"
        yield f"{scales_name(name)}: found {found}, expected {shape} for blocks of {BLOCK}×{BLOCK}"
    elif not scales.dtype.is_floating_point or scales.dtype == E4M3:
        found = f"type {type_name(scales.dtype)}"
        yield f"{scales_name(name)}: found {found}, expected values of a float type"


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

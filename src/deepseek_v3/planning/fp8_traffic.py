"""Bytes that FP8 training moves to quantize: what the functions of `ops/fp8` read and write in one step.

Axes as in the model: D width, H heads, Q q rank, C kv rank, F expert width. All numbers are bytes per token of one
layer, except those of weights, which are bytes per weight.
"""

from __future__ import annotations

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.planning.execution import FP8_ACTIVATION, FP8_WEIGHT, Execution, LayerKind

# One pass over a tensor in bfloat16 writes it in FP8 twice: by row and by column.
_BOTH = 2 + 2 * FP8_ACTIVATION
_ONE = 2 + FP8_ACTIVATION


def attention_traffic(model: ModelConfig) -> tuple[float, float]:
    """Bytes of the projections' inputs in a forward pass, and of their output gradients in a backward pass.

    The first projections of queries and of the latent read the same input, which is quantized once. The output of
    attention is quantized by row in the forward pass and by column in the backward pass.
    """
    width, heads, q_rank, kv_rank = (
        model.hidden_size,
        model.num_attention_heads,
        model.q_lora_rank or 0,
        model.kv_lora_rank,
    )
    values, queries = heads * model.v_head_dim, heads * model.qk_head_dim
    inputs = width + q_rank + kv_rank
    gradients = q_rank + queries + kv_rank + model.qk_rope_head_dim
    gradients += heads * (model.qk_nope_head_dim + model.v_head_dim) + width
    return _BOTH * inputs + _ONE * values, _BOTH * gradients + _ONE * values


def feed_forward_traffic(model: ModelConfig, kind: LayerKind, run: Execution) -> tuple[float, float]:
    """Bytes in a forward and in a backward pass of a dense network, or of shared and routed experts."""
    if kind == "dense":
        return _network_traffic(model, model.intermediate_size)
    shared = _network_traffic(model, model.n_shared_experts * model.moe_intermediate_size)
    routed = _experts_traffic(model, model.num_experts_per_tok * run.expert_imbalance)
    return shared[0] + routed[0], shared[1] + routed[1]


def weight_traffic(read: int) -> float:
    """Bytes per weight that is quantized once: `read` in its own type, and FP8, as it is and transposed."""
    return read + 2 * FP8_WEIGHT


def _swiglu_traffic(hidden: int) -> tuple[float, float]:
    """Forward: gate and up in bfloat16 become FP8, with their product. Backward: FP8 gate and up and the product's
    gradient become the product by column, and the gradients of gate and up by row and by column."""
    return (2 * 2 + 3 * FP8_ACTIVATION) * hidden, (2 + (2 + 1 + 2 + 2) * FP8_ACTIVATION) * hidden


def _network_traffic(model: ModelConfig, hidden: int) -> tuple[float, float]:
    """A dense network: its input and its output's gradient, each in both forms, and SwiGLU."""
    if not hidden:
        return 0.0, 0.0
    forward, backward = _swiglu_traffic(hidden)
    return _BOTH * model.hidden_size + forward, _BOTH * model.hidden_size + backward


def _experts_traffic(model: ModelConfig, rows: float) -> tuple[float, float]:
    """Routed experts with `rows` rows per token.

    A token and its gradient are quantized once, and gathered in FP8 for each row. In the backward pass, both are
    gathered from bfloat16 once more, by column.
    """
    width, (forward, backward) = model.hidden_size, _swiglu_traffic(model.moe_intermediate_size)
    once, gathered, by_column = _ONE * width, 2 * FP8_ACTIVATION * width, 2 * _ONE * width
    return once + rows * (gathered + forward), once + rows * (gathered + by_column + backward)

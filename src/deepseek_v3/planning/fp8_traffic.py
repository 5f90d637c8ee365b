"""Bytes that FP8 training moves to quantize: what the functions of `ops/fp8` read and write in one step.

Axes as in the model: D width, H heads, Q q rank, C kv rank, F expert width. Layers that are not in FP8 move
nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import projection_widths, rank_parameters
from deepseek_v3.planning.execution import FP8_ACTIVATION, FP8_WEIGHT, Execution, LayerKind
from deepseek_v3.planning.fp8_choice import DENSE_NETWORK, ROUTED_EXPERTS, SHARED_EXPERTS, share_in_fp8

# One pass over a tensor in bfloat16 writes it in FP8 twice: by row and by column.
_BOTH = 2 + 2 * FP8_ACTIVATION
_ONE = 2 + FP8_ACTIVATION


def activation_traffic(
    model: ModelConfig, kinds: Sequence[LayerKind], run: Execution, forward: int, ffn_forward: int
) -> float:
    """Bytes per token of layers of these kinds: numbers of forward passes through attention and through the
    feed-forward parts, and one backward pass."""
    attention = _attention_traffic(model, run)
    networks = [_feed_forward_traffic(model, kind, run) for kind in kinds]
    inside = sum(ffn_forward * before + after for before, after in networks)
    return len(kinds) * (forward * attention[0] + attention[1]) + inside


def weight_traffic(config: RunConfig, run: Execution, forward: int) -> float:
    """Bytes of a rank's weights in a micro-batch with `forward` forward passes.

    A weight is read in its own type, or in bfloat16 if it is gathered, and written in FP8 as it is and transposed.
    Norms, routers and the input projections of MTP layers count in proportion to all other weights.
    """
    weights = share_in_fp8(config.model, config.parallel.expert, run.fp8) * rank_parameters(config).layers
    times = forward if run.keeps_fp8_weights else forward + 1
    return times * weights * ((4 if config.parallel.data_shard == 1 else 2) + 2 * FP8_WEIGHT)


def _attention_traffic(model: ModelConfig, run: Execution) -> tuple[float, float]:
    """Bytes of the projections' inputs in a forward pass, and of their output gradients in a backward pass.

    The first projections of queries and of the latent read the same input, which is quantized once. The output of
    attention is quantized by row in the forward pass and by column in the backward pass.
    """
    in_fp8 = {
        name.removeprefix("self_attn."): widths
        for name, widths in projection_widths(model).items()
        if name in run.fp8
    }
    gradients = sum(after for _, after in in_fp8.values())
    values, _ = in_fp8.pop("o_proj", (0, 0))
    of_state = {"q_proj", "q_a_proj", "kv_a_proj_with_mqa"}
    inputs = sum(before for name, (before, _) in in_fp8.items() if name not in of_state)
    inputs += 0 if of_state.isdisjoint(in_fp8) else model.hidden_size
    return _BOTH * inputs + _ONE * values, _BOTH * gradients + _ONE * values


def _feed_forward_traffic(model: ModelConfig, kind: LayerKind, run: Execution) -> tuple[float, float]:
    """Bytes in both passes of what is in FP8 of a dense network, or of shared and routed experts."""
    if kind == "dense":
        return _network_traffic(model, model.intermediate_size) if DENSE_NETWORK in run.fp8 else (0.0, 0.0)
    shared, routed = (0.0, 0.0), (0.0, 0.0)
    if SHARED_EXPERTS in run.fp8:
        shared = _network_traffic(model, model.n_shared_experts * model.moe_intermediate_size)
    if ROUTED_EXPERTS in run.fp8:
        routed = _experts_traffic(model, model.num_experts_per_tok * run.expert_imbalance)
    return shared[0] + routed[0], shared[1] + routed[1]


def _swiglu_traffic(hidden: int) -> tuple[float, float]:
    """Forward: gate and up in bfloat16 become FP8, with their product. Backward: FP8 gate and up and the product's
    gradient become the product by column, and the gradients of gate and up by row and by column."""
    return (2 * 2 + 3 * FP8_ACTIVATION) * hidden, (2 + (2 + 1 + 2 + 2) * FP8_ACTIVATION) * hidden


def _network_traffic(model: ModelConfig, hidden: int) -> tuple[float, float]:
    """A dense network: its input and its output's gradient, each in both forms, and SwiGLU."""
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

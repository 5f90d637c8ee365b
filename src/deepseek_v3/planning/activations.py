"""Activation memory: the bytes that one layer saves for its backward pass, tensor by tensor.

Axes as in the model: D width, H heads, N qk_nope, R qk_rope, V v_head, Q q rank, C kv rank, E experts, K experts
per token, F expert width. All numbers are bytes per token of a micro-batch. They include the layer's output, but
not its input, which is the output of the layer before.
"""

from __future__ import annotations

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.planning.execution import FP8_ACTIVATION, Execution, LayerKind
from deepseek_v3.planning.fp8_choice import DENSE_NETWORK, ROUTED_EXPERTS, SHARED_EXPERTS


def saved_bytes(model: ModelConfig, kind: LayerKind, run: Execution) -> float:
    """Bytes per token that a layer of this kind saves between its forward and its backward pass."""
    parts = _compiled_attention(model, run) if run.compiled else _eager_attention(model, run)
    # In FP8, a dense network saves its input in its own format; the experts keep the tokens as they are.
    parts["normed state"] = 0 if kind == "dense" and DENSE_NETWORK in run.fp8 else run.width * model.hidden_size
    parts["mask"] = run.mask_bytes
    parts["feed-forward network"] = feed_forward_bytes(model, kind, run)
    if kind == "mtp":
        parts |= _mtp(model, run)
    parts["output"] = run.width * model.hidden_size
    return sum(parts.values())


def feed_forward_bytes(model: ModelConfig, kind: LayerKind, run: Execution) -> float:
    """The part of `saved_bytes` in the dense network, or in the MoE block."""
    return (
        network_bytes(model, model.intermediate_size, DENSE_NETWORK, run)
        if kind == "dense"
        else sum(_moe(model, run).values())
    )


def _input_bytes(run: Execution, *projections: str) -> float:
    """Bytes of each number of an input that these projections save for the gradients of their weights.

    Those in bfloat16 save the input itself, once. Those in FP8 save it in FP8: once in a compiled layer, else each
    for itself.
    """
    in_fp8 = sum(f"self_attn.{name}" in run.fp8 for name in projections)
    copies = min(in_fp8, 1) if run.compiled else in_fp8
    return copies * FP8_ACTIVATION + (run.width if in_fp8 < len(projections) else 0)


def _state_bytes(model: ModelConfig, run: Execution) -> float:
    """Bytes of each number of the attention's input, from which queries and latent are projected."""
    return _input_bytes(run, "q_a_proj" if model.q_lora_rank else "q_proj", "kv_a_proj_with_mqa")


def _compiled_attention(model: ModelConfig, run: Execution) -> dict[str, float]:
    """Attention, both norms and its residual connection, as the compiler's partitioner saves them."""
    width, heads = model.hidden_size, model.num_attention_heads
    kv_rank, rope = model.kv_lora_rank, model.qk_rope_head_dim
    return {
        "normed input": _state_bytes(model, run) * width,
        "compressed queries, before and after their norm": (2 + _input_bytes(run, "q_b_proj"))
        * (model.q_lora_rank or 0),
        "latent with rotary key, normed latent": 2 * (kv_rank + rope) + _input_bytes(run, "kv_b_proj") * kv_rank,
        "queries and keys": 2 * 2 * heads * model.qk_head_dim,
        "values": 2 * heads * model.v_head_dim,
        "attention output": 2 * heads * model.v_head_dim,
        "softmax and norm statistics": 4 * heads + 4 * (4 if model.q_lora_rank else 3),
        "output projection": 2 * width,
    }


def _eager_attention(model: ModelConfig, run: Execution) -> dict[str, float]:
    """The same without the compiler: each operation saves its inputs, norms save float32 twice."""
    width_bytes = run.width
    width, heads, q_rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank or 0
    kv_rank, rope, nope = model.kv_lora_rank, model.qk_rope_head_dim, model.qk_nope_head_dim
    input_copy = 4 * width if width_bytes == 2 else 0
    latent = 4 * (kv_rank + rope) if width_bytes == 4 else 4 * kv_rank
    expanded = model.v_head_dim if run.has_kernels else nope + model.v_head_dim
    return {
        "input and its norm": input_copy + (4 + _state_bytes(model, run)) * width,
        "compressed queries and their norm": (8 + _input_bytes(run, "q_b_proj")) * q_rank,
        "latent and its norm": latent + (4 + _input_bytes(run, "kv_b_proj")) * kv_rank,
        "queries and keys": 2 * width_bytes * heads * model.qk_head_dim,
        "expanded keys and values, or values alone": width_bytes * heads * expanded,
        "attention output": width_bytes * heads * model.v_head_dim,
        "softmax and norm statistics": 4 * heads + 4 * 4,
        "state after attention": 8 * width,
    }


def network_bytes(model: ModelConfig, hidden: int, name: str, run: Execution) -> float:
    """Bytes per token that the network of this name and hidden width saves.

    They are gate, up and their product; eager mode also saves the activated gate, in fp32.
    In FP8 they are gate and up, from which the backward pass computes the product again, and the network's input.
    """
    if name in run.fp8:
        return FP8_ACTIVATION * (2 * hidden + model.hidden_size)
    return 3 * 2 * hidden if run.compiled else (3 * 4 + run.width) * hidden


def _moe(model: ModelConfig, run: Execution) -> dict[str, float]:
    width, hidden = model.hidden_size, model.moe_intermediate_size
    rows = model.num_experts_per_tok * run.expert_imbalance
    if ROUTED_EXPERTS in run.fp8:
        # Gate and up, and the gate value. The tokens that came from other ranks are saved once, not row by row.
        rows_of_experts = rows * (FP8_ACTIVATION * 2 * hidden + 4)
        rows_of_experts += run.received_bytes * width
    elif run.compiled or run.has_kernels:  # also gate and up, and their product with the gate value
        rows_of_experts = rows * run.width * (width + 3 * hidden)
    else:  # each row saves gate, up, activated gate and their product in float32, then the result
        rows_of_experts = rows * (run.width * width + (4 * 4 + run.width) * hidden)
    return {
        **_routing(model, run),
        "rows of the experts": rows_of_experts,
        "shared experts": network_bytes(model, model.n_shared_experts * hidden, SHARED_EXPERTS, run),
    }


def _routing(model: ModelConfig, run: Execution) -> dict[str, float]:
    scores, chosen = 4 * model.n_routed_experts, model.num_experts_per_tok
    if run.compiled:
        place = 8 if ROUTED_EXPERTS in run.fp8 else 4
        return {
            "scores, their sum, the sum of the gates, and a mask": scores + 4 + 4 + 1,
            "choice and gates": (8 + 4) * chosen,
            "places of the rows, and in their order gates, in FP8 tokens": (8 + place) * chosen,
        }
    return {
        "router's input in float32": 4 * model.hidden_size if run.width == 2 and not run.has_kernels else 0,
        "scores": scores,
        "choice, gates and sums": (8 + 4) * chosen + 3 * 4 + 1,
        "order, its inverse, and sorted gates": (8 + 8 + 4) * chosen,
    }


def _mtp(model: ModelConfig, run: Execution) -> dict[str, float]:
    """What an MTP layer saves in addition: two concatenated norms, their projection, and its final norm."""
    width = model.hidden_size
    if run.compiled and not run.compiled_in_parts:
        states = 2 * (2 * width + width + width)
        return {"joined states, projected; state before the last norm": states, "statistics of three norms": 3 * 4}
    return {
        "norms of states and embeddings": 2 * (4 + (4 if run.width == 2 else 0)) * width,
        "joined states, projected": run.width * 2 * width + (4 * width if run.width == 4 else 0),
        "last norm": 8 * width,
    }

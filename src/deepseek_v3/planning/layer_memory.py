"""Memory of one layer of a rank during a training step: what it saves, and what its backward pass needs besides."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.activations import feed_forward_bytes, network_bytes, saved_bytes
from deepseek_v3.planning.counts import count_layers, mtp_projection_weights, owned_parameters
from deepseek_v3.planning.execution import FP8_ACTIVATION, FP8_WEIGHT, Execution, LayerKind
from deepseek_v3.planning.fp8_choice import DENSE_NETWORK, ROUTED_EXPERTS, SHARED_EXPERTS, weights_in_fp8


@dataclass(frozen=True)
class LayerMemory:
    """One layer on one rank; `parameters` and `whole` are numbers of parameters, all other fields are bytes.

    `parameters`: parameters that this rank owns, including `whole`, which every rank owns. `saved`: activations
    saved for the backward pass. `again`: activations that selective recomputation computes again there. `copies`:
    bfloat16 or FP8 weights saved with the activations. `gathered`: the gathered weights of a sharded layer, in the
    width of activations. `working`: gradients less freed tensors at the peak of the layer's own backward pass.
    """

    parameters: float
    whole: float
    saved: float
    again: float
    copies: float
    gathered: float
    working: float


def layer_memory(config: RunConfig, run: Execution, kind: LayerKind) -> LayerMemory:
    """What a layer of this kind needs on one rank."""
    model, parallel = config.model, config.parallel
    tokens = parallel.micro_batch_size * config.training.sequence_length
    dense = kind == "dense"
    counts = count_layers(model, int(dense), int(not dense), model.n_routed_experts)
    joining, more_norms = (mtp_projection_weights(model), 3 * model.hidden_size) if kind == "mtp" else (0, 0)
    routed = counts.routed_experts / parallel.expert
    whole = counts.norms + more_norms + counts.gates
    others = counts.total - counts.routed_experts + joining + more_norms - whole
    is_sharded, recomputes = parallel.data_shard > 1, parallel.recomputation != "none"
    partly = parallel.recomputation == "selective"
    narrow = weights_in_fp8(model, counts, run.fp8)
    in_networks = narrow.dense_ffn + narrow.shared_experts + narrow.routed_experts / parallel.expert
    in_fp8 = narrow.attention + (0 if partly else in_networks)
    saving = joining + (counts.attention if partly else routed + others - joining)
    again = feed_forward_bytes(model, kind, run) * tokens if partly else 0.0
    return LayerMemory(
        parameters=owned_parameters(parallel, counts.routed_experts, whole, others),
        whole=whole,
        saved=saved_bytes(model, kind, run) * tokens - again,
        again=again,
        copies=_copy_bytes(run, in_fp8, saving - in_fp8, is_sharded),
        gathered=run.width * (routed + others) if is_sharded else 0.0,
        working=_fp8_working_bytes(model, dense, run, tokens, parallel.expert, is_sharded)
        if (DENSE_NETWORK if dense else ROUTED_EXPERTS) in run.fp8
        else _working_bytes(model, dense, run, tokens, parallel.expert, frees_early=not (recomputes or is_sharded)),
    )


def _copy_bytes(run: Execution, in_fp8: float, others: float, is_sharded: bool) -> float:
    """Bytes of the weights that a layer saves for its backward pass: of `in_fp8` weights in FP8, and of `others`.

    The bfloat16 weights of a sharded layer are those that were gathered, and no copies.
    """
    if run.width == 4:
        return 0.0
    kept = FP8_WEIGHT * in_fp8 if run.keeps_fp8_weights else 0.0
    return kept + (0.0 if is_sharded else 2 * others)


def _working_bytes(
    model: ModelConfig, dense: bool, run: Execution, tokens: int, expert_ranks: int, frees_early: bool
) -> float:
    """Peak bytes in the backward pass of the feed-forward network: early for rows, late for the widest weight.

    A compiled backward pass computes a weight's gradient in bfloat16 and then copies it to float32; an eager one
    computes the experts' gradients one by one and then stacks them. `frees_early`: saved tensors and copies of
    weights are freed as soon as they have been used.
    """
    hidden = model.intermediate_size if dense else model.moe_intermediate_size
    rows = tokens if dense else tokens * model.num_experts_per_tok * run.expert_imbalance
    weight = model.hidden_size * hidden * (1.0 if dense else model.n_routed_experts / expert_ranks)
    if run.compiled:
        # The gradient of the product replaces the saved product. A dense network's output gradient is the states'.
        early = run.width * (rows * (hidden if dense else model.hidden_size) + weight)
    else:
        early = 4 * rows * (model.hidden_size + hidden)
        if not (dense or frees_early):  # saved tensors and one gradient of the shared experts are still allocated
            shared = model.n_shared_experts * hidden
            early += tokens * (network_bytes(model, shared, SHARED_EXPERTS, run) + 4 * shared)
    if not run.compiled:
        late = 20 * weight + run.width * rows * (model.hidden_size - 2 * hidden)
    elif frees_early:
        late = 10 * weight - 3 * run.width * rows * hidden
    else:
        late = 16 * weight - run.width * rows * hidden
    return max(early, late)


def _fp8_working_bytes(
    model: ModelConfig, dense: bool, run: Execution, tokens: int, expert_ranks: int, is_sharded: bool
) -> float:
    """Peak bytes in the backward pass of a layer whose dense network or routed experts are in FP8.

    It is the largest of its moments. In the first, SwiGLU's backward pass computes the FP8 gradients of gate and
    up, by row and by column, and the product by column; in the second, the gradient of the rows is computed. A
    layer that is compiled whole computes the gradients of weights last, if they are larger than their factors
    (`training/parallel/weight_gradients_last.py`), and the third moment is the backward pass of its attention. In
    other layers it is that in which the gradient of gate and up is computed. A weight's gradient has the dtype of
    the weight: float32, or bfloat16 if it is sharded, which the reduction then widens.
    """
    inner, width = model.intermediate_size if dense else model.moe_intermediate_size, model.hidden_size
    experts = 1 if dense else model.n_routed_experts / expert_ranks
    rows = tokens if dense else tokens * model.num_experts_per_tok * run.expert_imbalance
    by_column = FP8_ACTIVATION * (rows + 128 * experts)  # each expert's rows are padded to a multiple of 128
    by_row = FP8_ACTIVATION * rows
    weight = width * inner * experts
    down = (2 if is_sharded else 4) * weight
    swiglu = run.width * rows * inner + by_row * 2 * inner + by_column * 3 * inner
    if not run.compiled or run.compiled_in_parts:
        return max(
            swiglu,
            by_row * 2 * inner + by_column * (3 * inner + width) + down,
            by_row * 2 * inner + by_column * 2 * inner + run.width * rows * width + down,
            by_column * (2 * inner + width) + (16 if is_sharded else 12) * weight,
        )
    # Factors of the down projection's gradient: its output's gradient, which experts have by token, and its input.
    of_down = (by_column if dense else run.width * tokens) * width + by_column * inner
    waiting = min(down, of_down) + min(2 * down, by_column * 2 * inner)
    freed = feed_forward_bytes(model, "dense" if dense else "moe", run) * tokens
    if run.keeps_fp8_weights:
        freed += FP8_WEIGHT * 3 * weight
    return max(
        swiglu,
        by_row * 2 * inner + waiting + run.width * rows * width,
        waiting + _attention_working_bytes(model, run, is_sharded, tokens) - freed,
    )


def _attention_working_bytes(model: ModelConfig, run: Execution, is_sharded: bool, tokens: int) -> float:
    """Bytes in the backward pass of attention: gradients of output, queries, keys and values, and a float32 sum.

    The gradient of the output projection waits with its factor in FP8, which is the gradient of the layer's states,
    or exists if the projection is not in FP8.
    """
    heads, output = model.num_attention_heads, model.num_attention_heads * model.v_head_dim
    gradients = run.width * heads * (2 * model.v_head_dim + 2 * model.qk_head_dim) + 4 * heads * model.qk_head_dim
    weight = (2 if is_sharded else 4) * output * model.hidden_size
    waits = "self_attn.o_proj" in run.fp8
    return tokens * gradients + (min(weight, tokens * FP8_ACTIVATION * model.hidden_size) if waits else weight)

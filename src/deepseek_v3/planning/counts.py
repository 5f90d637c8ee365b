"""Numbers of parameters: of a model, of one token's forward pass, and of one rank of a layout."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part.

    `prediction` counts the MTP layers without the embedding and head that they share with the main model. The
    routing bias is not a parameter: it gets no gradient.
    """

    embedding: int = 0
    head: int = 0
    attention: int = 0
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    gates: int = 0
    norms: int = 0
    prediction: int = 0

    @property
    def total(self) -> int:
        """Parameters of the main model, as the published 671B counts them."""
        return self.with_prediction - self.prediction

    @property
    def with_prediction(self) -> int:
        """Parameters of the main model and its MTP layers: all that are trained and stored."""
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact numbers of parameters, equal to those of the built module; a tied head counts only as the embedding."""
    vocabulary = config.vocab_size * config.hidden_size
    counts = _count_model(config, config.n_routed_experts)
    return replace(counts, embedding=vocabulary, head=0 if config.tie_word_embeddings else vocabulary)


def count_active_parts(config: ModelConfig) -> ParameterCounts:
    """Parameters that one token is multiplied with: the chosen routed experts only; the head even if it is tied.

    `embedding` is 0, because a token only looks up its row.
    """
    return replace(_count_model(config, config.num_experts_per_tok), head=config.vocab_size * config.hidden_size)


def count_active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token is multiplied with, with the output head, without the embedding.

    This is the meaning of "active parameters" in this project; 36.6 billion for the published model.
    """
    return count_active_parts(config).total


def active_conventions(config: ModelConfig) -> dict[str, int]:
    """Active parameters by this project's convention (the first) and by three other common ones."""
    active = count_active_parts(config)
    return {
        "with_head": active.total,
        "with_head_and_embedding": active.total + count_parameters(config).head,  # tied, both are one matrix
        "without_head_or_embedding": active.total - active.head,
        "with_head_and_prediction": active.with_prediction,
    }


def count_layers(config: ModelConfig, dense: int, moe: int, experts: int) -> ParameterCounts:
    """Parameters of `dense` dense and `moe` MoE layers, counting `experts` routed experts in each MoE layer."""
    expert = _ffn(config, config.moe_intermediate_size)
    return ParameterCounts(
        attention=(dense + moe) * _attention(config),
        dense_ffn=dense * _ffn(config, config.intermediate_size),
        routed_experts=moe * experts * expert,
        shared_experts=moe * config.n_shared_experts * expert,
        gates=moe * config.n_routed_experts * config.hidden_size,
        norms=(dense + moe) * (2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)),
    )


@lru_cache
def count_float32_weights(config: ModelConfig) -> int:
    """Weights of all routers and norms, MTP layers included. They are replicated on every rank."""
    moe_layers = config.num_moe_layers + config.num_nextn_predict_layers
    counts = count_layers(config, config.first_k_dense_replace, moe_layers, 0)
    return counts.gates + counts.norms + (1 + 3 * config.num_nextn_predict_layers) * config.hidden_size


def mtp_projection_weights(config: ModelConfig) -> int:
    """Weights of the matrix that projects the concatenated states and embeddings of one MTP layer."""
    return 2 * config.hidden_size * config.hidden_size


def projection_widths(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The widths before and after each projection of attention, by the name of its module in a decoder layer."""
    width, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        widths = {"q_proj": (width, queries)}
    else:
        widths = {"q_a_proj": (width, config.q_lora_rank), "q_b_proj": (config.q_lora_rank, queries)}
    widths |= {
        "kv_a_proj_with_mqa": (width, rank + config.qk_rope_head_dim),
        "kv_b_proj": (rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": (heads * config.v_head_dim, width),
    }
    return {f"self_attn.{name}": pair for name, pair in widths.items()}


def _count_model(config: ModelConfig, experts: int) -> ParameterCounts:
    """All parameters except embedding and head, counting `experts` routed experts in each MoE layer."""
    layers = count_layers(config, config.first_k_dense_replace, config.num_moe_layers, experts)
    depth, width = config.num_nextn_predict_layers, config.hidden_size
    around = mtp_projection_weights(config) + 3 * width  # the projection of an MTP layer's inputs, and three norms
    prediction = count_layers(config, 0, depth, experts).total + depth * around
    return replace(layers, norms=layers.norms + width, prediction=prediction)


def _attention(config: ModelConfig) -> int:
    """Weights of one attention module, without the norms of its latents."""
    return sum(before * after for before, after in projection_widths(config).values())


def _ffn(config: ModelConfig, hidden_width: int) -> int:
    return 3 * config.hidden_size * hidden_width


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters of one rank.

    `layers` counts all layers that the rank computes, unsharded. Of these parameters, `experts` are in routed
    experts, and `whole` in routers and norms, which are not sharded. `owned` counts the parameters whose optimizer
    state the rank holds.
    """

    layers: float
    experts: float
    whole: float
    owned: float


def rank_parameters(config: RunConfig) -> RankParameters:
    """The parameters of one rank, averaged over the pipeline stages."""
    parallel, (routed, others, outside) = config.parallel, parameters_by_group(config.model)
    experts, whole, stages = routed / parallel.expert, count_float32_weights(config.model), parallel.pipeline
    share = owned_parameters(parallel, routed, whole, others + outside - whole)
    return RankParameters((experts + others) / stages, experts / stages, whole / stages, share / stages)


def owned_parameters(parallel: ParallelConfig, routed: float, whole: float, others: float) -> float:
    """How many of `routed` expert, `whole` unsharded and `others` remaining parameters one rank owns."""
    return routed / max(parallel.data_shard, parallel.expert) + whole + others / parallel.data_shard


@lru_cache
def parameters_by_group(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters of routed experts, of the rest of all layers, and of embedding and head."""
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    routed = count_layers(model, 0, moe_layers, model.n_routed_experts).routed_experts
    counts = count_parameters(model)
    outside = counts.embedding + counts.head
    return routed, counts.with_prediction - outside - routed, outside

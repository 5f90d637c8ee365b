"""Parameters of a model, from its config alone.

FOLDED: What one rank of a layout has of the model and of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part; prediction layers apart, without the embedding and head they share.

    The routing biases are not parameters: no gradient moves them.
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
        """Parameters of the main model and of its prediction layers: all that is trained and stored."""
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact counts, equal to those of the built module; a tied head counts once, as the embedding."""
    vocabulary = config.vocab_size * config.hidden_size
    counts = _count_model(config, config.n_routed_experts)
    return replace(counts, embedding=vocabulary, head=0 if config.tie_word_embeddings else vocabulary)


def count_active_parts(config: ModelConfig) -> ParameterCounts:
    """What one token multiplies with: of the routed experts the chosen ones, the head also where it is tied.

    The embedding is 0: a token looks its row up.
    """
    return replace(_count_model(config, config.num_experts_per_tok), head=config.vocab_size * config.hidden_size)


def count_active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token multiplies with: output head included, input embedding not.

    The one convention for "active" throughout this project; 36.6 billion for the published model.
    """
    return count_active_parts(config).total


def active_conventions(config: ModelConfig) -> dict[str, int]:
    """What "active parameters" come to by this project's convention, the first, and by three others in use."""
    active = count_active_parts(config)
    return {
        "with_head": active.total,
        "with_head_and_embedding": active.total + count_parameters(config).head,  # tied, both are one matrix
        "without_head_or_embedding": active.total - active.head,
        "with_head_and_prediction": active.with_prediction,
    }


def count_layers(config: ModelConfig, dense: int, moe: int, experts: int) -> ParameterCounts:
    """Parameters of so many dense and MoE layers, `experts` of the routed experts counted in each MoE layer."""
    expert = _ffn(config, config.moe_intermediate_size)
    return ParameterCounts(
        attention=(dense + moe) * _attention(config),
        dense_ffn=dense * _ffn(config, config.intermediate_size),
        routed_experts=moe * experts * expert,
        shared_experts=moe * config.n_shared_experts * expert,
        gates=moe * config.n_routed_experts * config.hidden_size,
        norms=(dense + moe) * (2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)),
    )


def count_float32_weights(config: ModelConfig) -> int:
    """Weights of all routers and norms, prediction layers included: those that every rank holds whole."""
    moe_layers = config.num_moe_layers + config.num_nextn_predict_layers
    counts = count_layers(config, config.first_k_dense_replace, moe_layers, 0)
    return counts.gates + counts.norms + (1 + 3 * config.num_nextn_predict_layers) * config.hidden_size


def mtp_projection_weights(config: ModelConfig) -> int:
    """Weights of the matrix with which one prediction layer joins states and embeddings."""
    return 2 * config.hidden_size * config.hidden_size


def _count_model(config: ModelConfig, experts: int) -> ParameterCounts:
    """All but embedding and head, `experts` of the routed experts counted in each MoE layer."""
    layers = count_layers(config, config.first_k_dense_replace, config.num_moe_layers, experts)
    depth, width = config.num_nextn_predict_layers, config.hidden_size
    around = mtp_projection_weights(config) + 3 * width  # the projection of an MTP layer's inputs, and three norms
    prediction = count_layers(config, 0, depth, experts).total + depth * around
    return replace(layers, norms=layers.norms + width, prediction=prediction)


def _attention(config: ModelConfig) -> int:
    """Weights of one attention module, the norms of its latents excluded."""
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    q = width * queries if config.q_lora_rank is None else config.q_lora_rank * (width + queries)
    kv_down = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    kv_up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + kv_down + kv_up + heads * config.v_head_dim * width


def _ffn(config: ModelConfig, hidden_width: int) -> int:
    return 3 * config.hidden_size * hidden_width


@dataclass(frozen=True)
class RankParameters:
    """How many parameters a rank works on.

    `layers`: in whole layers; of these `experts` in routed experts, and `whole` in routers and norms, which every
    rank holds whole. `owned`: those that the rank updates.
    """

    layers: float
    experts: float
    whole: float
    owned: float


def rank_parameters(config: RunConfig) -> RankParameters:
    """Those of one rank, on average over pipeline stages."""
    parallel, (routed, others, outside) = config.parallel, parameters_by_group(config.model)
    experts, whole, stages = routed / parallel.expert, count_float32_weights(config.model), parallel.pipeline
    share = owned_parameters(parallel, routed, whole, others + outside - whole)
    return RankParameters((experts + others) / stages, experts / stages, whole / stages, share / stages)


def owned_parameters(parallel: ParallelConfig, routed: float, whole: float, others: float) -> float:
    """How many a rank owns of parameters in routed experts, in what every rank holds whole, and of others."""
    return routed / max(parallel.data_shard, parallel.expert) + whole + others / parallel.data_shard


@lru_cache
def parameters_by_group(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters of routed experts, of all else in layers, and of embedding and head."""
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    routed = count_layers(model, 0, moe_layers, model.n_routed_experts).routed_experts
    counts = count_parameters(model)
    outside = counts.embedding + counts.head
    return routed, counts.with_prediction - outside - routed, outside

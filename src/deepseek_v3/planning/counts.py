"""Parameters and floating-point operations of a model, from its config alone.

Axes as in the model: D width, H heads, N qk_nope, R qk_rope, V v_head, Q q rank, C kv rank, E experts, F expert
width. An operation is one multiplication or one addition, so a product with a weight costs two per token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from deepseek_v3.config.model_config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part; prediction layers apart, without the embedding and head they share.

    The routing biases are not parameters: no gradient moves them.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    gates: int
    norms: int
    prediction: int

    @property
    def total(self) -> int:
        """Parameters of the main model, as the published 671B counts them."""
        return self.with_prediction - self.prediction

    @property
    def with_prediction(self) -> int:
        """Parameters of the main model and of its prediction layers: all that is trained and stored."""
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact counts, equal to those of the built module."""
    layers, moe_layers = config.num_hidden_layers, config.num_moe_layers
    vocabulary = config.vocab_size * config.hidden_size
    depth = config.num_nextn_predict_layers
    return ParameterCounts(
        embedding=vocabulary,
        head=0 if config.tie_word_embeddings else vocabulary,
        attention=layers * _attention(config),
        dense_ffn=(layers - moe_layers) * _ffn(config, config.intermediate_size),
        routed_experts=moe_layers * config.n_routed_experts * _ffn(config, config.moe_intermediate_size),
        shared_experts=moe_layers * config.n_shared_experts * _ffn(config, config.moe_intermediate_size),
        gates=moe_layers * _gate(config),
        norms=layers * _layer_norms(config) + config.hidden_size,
        prediction=depth * _prediction_layer(config),
    )


def count_active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token multiplies with: output head included, input embedding not.

    The one convention for "active" throughout this project; 36.6 billion for the published model.
    """
    counts = count_parameters(config)
    idle_experts = config.n_routed_experts - config.num_experts_per_tok
    idle = config.num_moe_layers * idle_experts * _ffn(config, config.moe_intermediate_size)
    head = config.vocab_size * config.hidden_size
    return counts.total - counts.embedding - counts.head + head - idle


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of forward and backward per token, prediction layers included, recomputation not.

    6 × (active matrix weights, head included, + attention scores and their use, causal: half the length).
    """
    matrices = count_active_parameters(config) - count_parameters(config).norms
    scores = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length / 2
    per_depth = _active_prediction_matrices(config) + config.vocab_size * config.hidden_size + scores
    return 6 * (matrices + config.num_hidden_layers * scores + config.num_nextn_predict_layers * per_depth)


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


def _gate(config: ModelConfig) -> int:
    return config.n_routed_experts * config.hidden_size


def _layer_norms(config: ModelConfig) -> int:
    return 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)


def _prediction_layer(config: ModelConfig) -> int:
    experts = config.n_routed_experts + config.n_shared_experts
    layer = _attention(config) + experts * _ffn(config, config.moe_intermediate_size) + _gate(config)
    joining = 2 * config.hidden_size * config.hidden_size
    return layer + _layer_norms(config) + joining + 3 * config.hidden_size


def _active_prediction_matrices(config: ModelConfig) -> int:
    idle_experts = config.n_routed_experts - config.num_experts_per_tok
    idle = idle_experts * _ffn(config, config.moe_intermediate_size)
    return _prediction_layer(config) - _layer_norms(config) - 3 * config.hidden_size - idle

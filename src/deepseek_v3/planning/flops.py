"""Floating-point operations of training, per token, from the config and the sequence length alone.

An operation is one multiplication or one addition, so each weight costs a token two. Attention is causal: on
average a query attends to half the sequence. Every MTP layer is counted as running on all tokens, although depth k
has no target for the last k of a sequence. Embedding look-ups, norms, softmax and activation functions are not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.planning.counts import (
    ParameterCounts,
    count_active_parts,
    count_layers,
    mtp_projection_weights,
)
from deepseek_v3.planning.execution import LayerKind
from deepseek_v3.planning.fp8_choice import weights_in_fp8

Recomputation = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ForwardFlops:
    """Operations per token of one forward pass, by part; `joining` is the input projection of MTP layers."""

    attention_projections: int
    attention_scores: int  # queries times keys, and weights times values
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    gates: int
    joining: int
    head: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def feed_forward(self) -> int:
        """The feed-forward parts: everything after attention."""
        return self.dense_ffn + self.routed_experts + self.shared_experts + self.gates


@dataclass(frozen=True)
class FlopCounts:
    """Operations per token of a training step.

    `attention` is the part of attention scores and their use in forward, backward and recomputation together.
    """

    forward: int
    backward: int
    recomputation: int
    attention: int

    @property
    def total(self) -> int:
        """All operations that the hardware executes."""
        return self.forward + self.backward + self.recomputation


def flops_per_token(config: ModelConfig, sequence_length: int, recomputation: Recomputation = "none") -> FlopCounts:
    """Operations of forward, backward (twice the forward) and recomputation, MTP layers included.

    Full recomputation repeats the forward pass of every layer, but not of the head; selective recomputation repeats
    only the feed-forward parts.
    """
    parts = (forward_flops(config, sequence_length), mtp_forward_flops(config, sequence_length))
    forward = sum(part.total for part in parts)
    again = {"none": 0, "selective": sum(part.feed_forward for part in parts)}
    repeated = again.get(recomputation, forward - sum(part.head for part in parts))
    passes = 4 if recomputation == "full" else 3
    return FlopCounts(forward, 2 * forward, repeated, passes * sum(part.attention_scores for part in parts))


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Operations that model FLOPs utilisation (MFU) counts: forward and backward, without recomputation.

    6 × active weights of matrices, with the head, + 3 × operations of attention scores and their use.
    """
    return flops_per_token(config, sequence_length).total


def forward_flops(config: ModelConfig, sequence_length: int) -> ForwardFlops:
    """Operations per token of the main model's forward pass, by part."""
    active = count_active_parts(config)
    scores = config.num_hidden_layers * _scores(config, sequence_length)
    return _doubled(active, scores, joining=0, head=active.head)


def mtp_forward_flops(config: ModelConfig, sequence_length: int) -> ForwardFlops:
    """Operations per token of the forward pass of all MTP layers, by part; each also runs the shared head."""
    depth = config.num_nextn_predict_layers
    active = count_layers(config, 0, depth, config.num_experts_per_tok)
    head = depth * config.vocab_size * config.hidden_size
    return _doubled(active, depth * _scores(config, sequence_length), depth * mtp_projection_weights(config), head)


def forward_flops_in_fp8(config: ModelConfig, in_fp8: frozenset[str]) -> ForwardFlops:
    """Of the operations per token of the model's and all MTP layers' forward pass, those of the layers in FP8."""
    moe_layers = config.num_moe_layers + config.num_nextn_predict_layers
    active = count_layers(config, config.first_k_dense_replace, moe_layers, config.num_experts_per_tok)
    return _doubled(weights_in_fp8(config, active, in_fp8), scores=0, joining=0, head=0)


def layer_flops(config: ModelConfig, kind: LayerKind, sequence_length: int) -> int:
    """Operations per token of the forward pass of one layer of a kind."""
    dense = kind == "dense"
    active = count_layers(config, int(dense), int(not dense), config.num_experts_per_tok)
    joining = mtp_projection_weights(config) if kind == "mtp" else 0
    return _doubled(active, _scores(config, sequence_length), joining, head=0).total


def head_flops(config: ModelConfig) -> int:
    """Operations of one token's logits."""
    return 2 * config.vocab_size * config.hidden_size


def _doubled(active: ParameterCounts, scores: int, joining: int, head: int) -> ForwardFlops:
    """Two operations per weight; `scores` is a number of operations already."""
    return ForwardFlops(
        attention_projections=2 * active.attention,
        attention_scores=scores,
        dense_ffn=2 * active.dense_ffn,
        routed_experts=2 * active.routed_experts,
        shared_experts=2 * active.shared_experts,
        gates=2 * active.gates,
        joining=2 * joining,
        head=2 * head,
    )


def _scores(config: ModelConfig, sequence_length: int) -> int:
    """Operations per token of one layer's scores and their use: two per multiply-add, over half the length."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length

"""One layer of the model: latent attention, then a dense or an MoE feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import AttentionMetadata, MultiHeadLatentAttention
from deepseek_v3.mla.cached_sequences import CacheView
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.moe.experts import FeedForward
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.layers import RMSNorm


def call_directly(module: nn.Module, *inputs: Any) -> Any:
    """Calls a module. Activation checkpointing replaces this function by one that also calls it again later."""
    return module(*inputs)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer (DeepSeek-V3 report, figure 2), number `layer` from 0."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.run_feed_forward: Callable[..., Any] = call_directly
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MixtureOfExperts | FeedForward
        if config.is_moe_layer(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BSD: Tensor, metadata: AttentionMetadata, cache: CacheView | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Maps (B, S, D) to (B, S, D); also returns the routing statistics, None for a dense layer."""
        x_BSD, normed_BSD = self.attend(x_BSD, metadata, cache)
        y_BSD = self.run_feed_forward(self.mlp, normed_BSD)
        y_BSD, stats = y_BSD if isinstance(y_BSD, tuple) else (y_BSD, None)
        return x_BSD + y_BSD, stats

    def attend(
        self, x_BSD: Tensor, metadata: AttentionMetadata, cache: CacheView | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the attention half; returns its output (B, S, D), also normed for the feed-forward network."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), metadata, cache)
        return x_BSD, self.post_attention_layernorm(x_BSD)

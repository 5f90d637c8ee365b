"""Multi-token prediction (DeepSeek-V3 report, §2.2, eq. 21-23)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.cached_sequences import CacheView
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.layers import Linear, RMSNorm


class MTPLayer(DecoderLayer):
    """The module of one prediction depth: it combines the states of the previous depth with the next tokens.

    Embedding and head belong to the main model. Names, and the order of the two inputs of `eh_proj`, are those of
    the released weights. Each depth passes the states that its head reads to the next depth.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(  # type: ignore[override]  # a prediction layer is never run in place of a main one
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        metadata: AttentionMetadata,
        cache: CacheView | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """Computes depth k's states from depth k - 1's states at positions i and the embeddings of tokens i + k.

        With a cache, also stores the rows of positions i in it and attends to its rows, as a main layer does.
        """
        y_BSD, stats = super().forward(self.joined(hidden_BSD, embedded_BSD), metadata, cache)
        return self.head_norm(y_BSD), stats

    def joined(self, hidden_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """What enters the layer, (B, S, D): eq. 21."""
        joined_BSX = torch.cat((self.enorm(embedded_BSD), self.hnorm(hidden_BSD)), dim=-1)
        return self.eh_proj(joined_BSX)

    @property
    def head_norm(self) -> RMSNorm:
        """The norm before the head."""
        norm = self.shared_head["norm"]
        assert isinstance(norm, RMSNorm)
        return norm

"""The latent cache: all that generation keeps of the past.

Per token and layer it holds kv_lora_rank + qk_rope_head_dim numbers (the normalised latent and the rotated
shared key, DeepSeek-V2 report §2.1.3) where multi-head attention would hold every head's key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig


class LatentCache:
    """Cached rows of a batch, one tensor (batch, capacity, kv_lora_rank + qk_rope_head_dim) per layer.

    `lengths_B` int64 says how many tokens of each sequence are cached; sequences of a batch may differ.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, capacity, latent_width(config))
        self.rows_BTL = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.is_empty = True

    @property
    def capacity(self) -> int:
        """The most tokens that fit, per sequence."""
        return self.rows_BTL[0].shape[1]

    def next_positions(self, num_tokens: int) -> Tensor:
        """Positions (batch, num_tokens) int64 of the tokens that come next."""
        return self.lengths_B[:, None] + torch.arange(num_tokens, device=self.lengths_B.device)

    def write(self, layer: int, positions_BS: Tensor, latent_BSL: Tensor) -> Tensor:
        """Stores one layer's rows at their positions and returns all rows of that layer; lengths stay."""
        rows_BTL = self.rows_BTL[layer]
        index_BSL = positions_BS[..., None].expand(-1, -1, rows_BTL.shape[-1])
        rows_BTL.scatter_(1, index_BSL, latent_BSL.to(rows_BTL.dtype))
        return rows_BTL

    def advance(self, num_tokens_B: Tensor) -> None:
        """Counts the tokens that every layer has written; rows beyond the count are overwritten next."""
        self.lengths_B += num_tokens_B
        self.is_empty = False


def latent_width(config: ModelConfig) -> int:
    """Numbers cached per token and layer."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def expanded_width(config: ModelConfig) -> int:
    """Numbers that multi-head attention of the same heads would cache per token and layer."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)

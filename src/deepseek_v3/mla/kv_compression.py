"""The latent cache, the only state that generation keeps of past tokens.

Per token and layer it holds kv_lora_rank + qk_rope_head_dim numbers: the normalised latent and the rotated shared
key (DeepSeek-V2 report, §2.1.3). Multi-head attention would cache the key and value of every head.

Axes: B batch, S new tokens, T capacity, L width of a cached row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig


class LatentCache:
    """Cached rows of a batch: one tensor (batch, capacity, kv_lora_rank + qk_rope_head_dim) per layer.

    `lengths_B` int64 is the number of cached tokens of each sequence; the sequences of a batch may differ in it.
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
        """The maximum number of tokens per sequence."""
        return self.rows_BTL[0].shape[1]

    def next_positions(self, num_tokens: int) -> Tensor:
        """The positions of the next `num_tokens` tokens of each sequence; (batch, num_tokens) int64."""
        return self.lengths_B[:, None] + torch.arange(num_tokens, device=self.lengths_B.device)

    def write(self, layer: int, positions_BS: Tensor, latent_BSL: Tensor) -> Tensor:
        """Stores one layer's rows at their positions and returns all its rows. Does not change `lengths_B`."""
        rows_BTL = self.rows_BTL[layer]
        index_BSL = positions_BS[..., None].expand(-1, -1, rows_BTL.shape[-1])
        rows_BTL.scatter_(1, index_BSL, latent_BSL.to(rows_BTL.dtype))
        return rows_BTL

    def advance(self, num_tokens_B: Tensor) -> None:
        """Adds tokens that every layer has written to `lengths_B`; later writes overwrite the rows after these."""
        self.lengths_B += num_tokens_B
        self.is_empty = False


def latent_width(config: ModelConfig) -> int:
    """Numbers cached per token and layer."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def expanded_width(config: ModelConfig) -> int:
    """Numbers that multi-head attention of the same heads would cache per token and layer."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)

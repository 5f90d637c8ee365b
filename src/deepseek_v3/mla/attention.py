"""Multi-head latent attention (DeepSeek-V3 report, §2.1.1, eq. 1-11).

Axes: B batch, S sequence, T cached tokens, D model width, H heads, N qk_nope, R qk_rope, V v_head, C kv rank,
K = N + R, L = C + R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.kv_compression import LatentCache
from deepseek_v3.mla.rotary import softmax_scale
from deepseek_v3.ops.attention import ATTENTION, Attention, sdpa_attention
from deepseek_v3.ops.layers import Linear, RMSNorm
from deepseek_v3.ops.mla_decode import MLA_DECODE, MlaDecode, mla_decode
from deepseek_v3.ops.operation import Select
from deepseek_v3.ops.rotary import ROTARY, JoinHeads, join_heads, rotate

# The released modules normalise both latents with this constant, not with the config's rms_norm_eps.
_LATENT_NORM_EPS = 1e-6


class AttentionMetadata(NamedTuple):
    """Positions, rotary tables and mask of the tokens of one forward pass.

    `positions_BS` int64; `cos_BSP`, `sin_BSP` float32 from `rotary_tables`; `allowed_BSS` bool (query, key), if
    given, replaces the causal mask.
    """

    positions_BS: Tensor
    cos_BSP: Tensor
    sin_BSP: Tensor
    allowed_BSS: Tensor | None = None


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values are expanded from one small latent per token.

    Training expands the latents and attends as usual. Generation caches only the latent and the shared rotary key,
    and absorbs the expansion into the query and the output projection.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.scale = softmax_scale(config)
        self.attend: Attention = sdpa_attention
        self.decode: MlaDecode = mla_decode
        self.join_heads: JoinHeads = join_heads
        width, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        queries = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = Linear(width, rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(rank, _LATENT_NORM_EPS)
        self.kv_b_proj = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, width)

    def select_backends(self, select: Select) -> None:
        config = self.config
        self.attend = select(ATTENTION, config.qk_head_dim, config.v_head_dim)
        self.decode = select(MLA_DECODE, config.kv_lora_rank, config.qk_rope_head_dim)
        self.join_heads = select(ROTARY, config.qk_head_dim, config.v_head_dim)

    def forward(self, x_BSD: Tensor, metadata: AttentionMetadata, cache: LatentCache | None = None) -> Tensor:
        """(B, S, D) to (B, S, D). With a cache, also stores the new tokens' rows and attends to all cached rows."""
        q_BSHK = self._queries(x_BSD)
        latent_BSC, k_rope_BSR = self._compress(x_BSD)
        if cache is not None:
            latent_BSL = torch.cat((latent_BSC, _rotated(k_rope_BSR.unsqueeze(2), metadata).squeeze(2)), dim=-1)
            rows_BTL = cache.write(self.layer, metadata.positions_BS, latent_BSL)
            if not cache.is_empty:
                out_BSHV = self._attend_absorbed(q_BSHK, rows_BTL, metadata)
                return self.o_proj(out_BSHV.flatten(-2))
        out_BSHV = self._attend_expanded(q_BSHK, latent_BSC, k_rope_BSR, metadata)
        return self.o_proj(out_BSHV.flatten(-2))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """Eq. 6 and 7: the query of every head, its last R numbers not yet rotated; (B, S, H, K)."""
        if self.config.q_lora_rank is None:
            q_BSX = self.q_proj(x_BSD)
        else:
            q_BSX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return q_BSX.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))

    def _compress(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 1 and 3: the normalised latent, and the key that all heads share, not yet rotated."""
        latent_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1
        )
        return self.kv_a_layernorm(latent_BSC), k_rope_BSR

    def _attend_expanded(
        self, q_BSHK: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Eq. 2 to 5 and 8 to 10: expands keys and values of every head and attends to them; (B, S, H, V)."""
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.config.num_attention_heads, -1))
        tables = metadata.cos_BSP, metadata.sin_BSP
        q_BSHK, k_BSHK, v_BSHV = self.join_heads(q_BSHK, kv_BSHX, k_rope_BSR, *tables)
        return self.attend(q_BSHK, k_BSHK, v_BSHV, self.scale, metadata.allowed_BSS)

    def _attend_absorbed(self, q_BSHK: Tensor, rows_BTL: Tensor, metadata: AttentionMetadata) -> Tensor:
        """The same from cached latents: the query absorbs W_UK and the output absorbs W_UV; (B, S, H, V)."""
        config = self.config
        q_nope_BSHN, q_rope_BSHR = q_BSHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        w_HXC = self.kv_b_proj.weight.to(q_nope_BSHN.dtype).unflatten(0, (config.num_attention_heads, -1))
        w_uk_HNC, w_uv_HVC = w_HXC.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        q_latent_BSHC = torch.einsum("bshn,hnc->bshc", q_nope_BSHN, w_uk_HNC)
        q_BSHL = torch.cat((q_latent_BSHC, _rotated(q_rope_BSHR, metadata)), dim=-1)
        out_BSHC = self.decode(q_BSHL, rows_BTL, metadata.positions_BS, config.kv_lora_rank, self.scale)
        return torch.einsum("bshc,hvc->bshv", out_BSHC, w_uv_HVC)


def _rotated(x_BSHR: Tensor, metadata: AttentionMetadata) -> Tensor:
    return rotate(x_BSHR, metadata.cos_BSP, metadata.sin_BSP)

"""Multi-head latent attention (DeepSeek-V3 report, §2.1.1, eq. 1-11).

Axes: B batch, S sequence or new tokens, T cached tokens, D model width, H heads, N qk_nope, R qk_rope, V v_head,
C kv rank, K = N + R, L = C + R, X = N + V, P = R/2 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.cached_sequences import CacheView
from deepseek_v3.mla.rotary import softmax_scale
from deepseek_v3.ops.attention import ATTENTION, Attention, sdpa_attention
from deepseek_v3.ops.layers import Linear, RMSNorm
from deepseek_v3.ops.mla_decode import MLA_DECODE, MlaDecode, reference
from deepseek_v3.ops.operation import Select, copyable
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


def expanding_is_cheaper(config: ModelConfig, queries: int, keys: int) -> bool:
    """Whether `queries` new tokens attend to `keys` cached ones, the new ones included, in fewer operations when
    keys and values are expanded from the cache than when query and output absorb the expansion.

    Multiply-adds per head: absorbed attention takes L + C for each pair of query and key and C·X for each query;
    expanded attention takes K + V for each pair and C·X for each key. At the shape of DeepSeek-V3 a long cached
    text is expanded for chunks of more than 170 tokens.
    """
    absorbed = config.kv_lora_rank + config.qk_rope_head_dim + config.kv_lora_rank
    expanded = config.qk_head_dim + config.v_head_dim
    expansion = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    return queries * (keys * absorbed + expansion) > keys * (queries * expanded + expansion)


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
        self.cached: MlaDecode = copyable(reference)
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
        self.cached = copyable(select(MLA_DECODE, config.kv_lora_rank, config.qk_rope_head_dim))
        self.join_heads = select(ROTARY, config.qk_head_dim, config.v_head_dim)

    def forward(self, x_BSD: Tensor, metadata: AttentionMetadata, cache: CacheView | None = None) -> Tensor:
        """(B, S, D) to (B, S, D). With a cache, also stores the new tokens' rows and attends to all cached rows."""
        q_BSHK = self._queries(x_BSD)
        kv_BSL = self.kv_a_proj_with_mqa(x_BSD)
        if cache is not None:
            self._write(kv_BSL, metadata, cache)
        if cache is None or cache.is_new:
            out_BSHV = self._attend_expanded(q_BSHK, kv_BSL, metadata)
        elif expanding_is_cheaper(self.config, q_BSHK.shape[1], cache.longest):
            out_BSHV = self._attend_cached_expanded(q_BSHK, metadata, cache)
        else:
            out_BSHV = self._attend_absorbed(q_BSHK, metadata, cache)
        return self.o_proj(out_BSHV.flatten(-2))

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The up-projections of keys, W_UK (H, N, C), and of values, W_UV (H, V, C), in `dtype`."""
        config = self.config
        w_HXC = self.kv_b_proj.weight.to(dtype).unflatten(0, (config.num_attention_heads, -1))
        w_uk_HNC, w_uv_HVC = w_HXC.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        return w_uk_HNC, w_uv_HVC

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """Eq. 6 and 7: the query of every head, its last R numbers not yet rotated; (B, S, H, K)."""
        if self.config.q_lora_rank is None:
            q_BSX = self.q_proj(x_BSD)
        else:
            q_BSX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return q_BSX.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))

    def _write(self, kv_BSL: Tensor, metadata: AttentionMetadata, cache: CacheView) -> None:
        """Eq. 1 and 3: stores the new tokens' normalised latents and the rotated keys that all heads share."""
        norm, layout = self.kv_a_layernorm, cache.pool.layout
        tables = metadata.cos_BSP.flatten(0, 1), metadata.sin_BSP.flatten(0, 1)
        slots_N, kv_NL = cache.slots_BS.flatten(), kv_BSL.flatten(0, 1)
        self.cached.write_latents(
            cache.pool.pages[self.layer], slots_N, kv_NL, norm.weight, norm.eps, *tables, layout
        )

    def _attend_expanded(self, q_BSHK: Tensor, kv_BSL: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Eq. 1 to 5 and 8 to 10: expands keys and values of every head and attends to them; (B, S, H, V)."""
        latent_BSC, k_rope_BSR = kv_BSL.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        kv_BSHX = self._expand(self.kv_a_layernorm(latent_BSC))
        tables = metadata.cos_BSP, metadata.sin_BSP
        q_BSHK, k_BSHK, v_BSHV = self.join_heads(q_BSHK, kv_BSHX, k_rope_BSR, *tables)
        return self.attend(q_BSHK, k_BSHK, v_BSHV, self.scale, metadata.allowed_BSS)

    def _attend_cached_expanded(self, q_BSHK: Tensor, metadata: AttentionMetadata, cache: CacheView) -> Tensor:
        """The same with the latents and keys of all cached tokens; (B, S, H, V)."""
        config = self.config
        rows_BTL = cache.read(self.layer, q_BSHK.dtype)
        latent_BTC, k_rope_BTR = rows_BTL.split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        k_nope_BTHN, v_BTHV = self._expand(latent_BTC).split((config.qk_nope_head_dim, config.v_head_dim), -1)
        k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, config.num_attention_heads, -1)
        k_BTHK = torch.cat((k_nope_BTHN, k_rope_BTHR), dim=-1)
        q_nope_BSHN, q_rope_BSHR = q_BSHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        q_BSHK = torch.cat((q_nope_BSHN, _rotated(q_rope_BSHR, metadata)), dim=-1)
        place_T = torch.arange(cache.longest, device=q_BSHK.device)
        allowed_BST = place_T <= metadata.positions_BS[..., None]
        return self.attend(q_BSHK, k_BTHK, v_BTHV, self.scale, allowed_BST)

    def _attend_absorbed(self, q_BSHK: Tensor, metadata: AttentionMetadata, cache: CacheView) -> Tensor:
        """The same from cached latents: the query absorbs W_UK and the output absorbs W_UV; (B, S, H, V)."""
        config = self.config
        q_nope_BSHN, q_rope_BSHR = q_BSHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        w_uk_HNC, w_uv_HVC = self._absorbed_weights(q_BSHK.dtype, cache)
        q_latent_BSHC = torch.einsum("bshn,hnc->bshc", q_nope_BSHN, w_uk_HNC)
        q_BSHL = torch.cat((q_latent_BSHC, _rotated(q_rope_BSHR, metadata)), dim=-1)
        out_BSHC = self._decode(q_BSHL, cache)
        return torch.einsum("bshc,hvc->bshv", out_BSHC, w_uv_HVC)

    def _decode(self, q_BSHL: Tensor, cache: CacheView) -> Tensor:
        """Attends to the cached rows; (B, S, H, C). The last of the S queries must be a sequence's last token.

        So padding moves from the right to the left and back.
        """
        pages, layout = cache.pool.pages[self.layer], cache.pool.layout
        if cache.right_aligned_BS is None:
            return self.cached.mla_decode(q_BSHL, pages, cache.table_BM, cache.lengths_B, layout, self.scale)[0]
        rotation = torch.arange(q_BSHL.shape[0], device=q_BSHL.device)[:, None], cache.right_aligned_BS
        q_BSHL = q_BSHL[rotation]
        out_BSHC, _ = self.cached.mla_decode(q_BSHL, pages, cache.table_BM, cache.lengths_B, layout, self.scale)
        return torch.empty_like(out_BSHC).index_put_(rotation, out_BSHC)

    def _absorbed_weights(self, dtype: torch.dtype, cache: CacheView) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C) in `dtype`, cast once for a pool."""
        kept = cache.pool.absorbed
        if self.layer not in kept or kept[self.layer][0].dtype != dtype:
            kept[self.layer] = self.absorbed_weights(dtype)
        return kept[self.layer]

    def _expand(self, latent: Tensor) -> Tensor:
        """Eq. 2 and 5: the key without position and the value of every head; (B, S, C) to (B, S, H, X)."""
        return self.kv_b_proj(latent).unflatten(-1, (self.config.num_attention_heads, -1))


def _rotated(x_BSHR: Tensor, metadata: AttentionMetadata) -> Tensor:
    return rotate(x_BSHR, metadata.cos_BSP, metadata.sin_BSP)

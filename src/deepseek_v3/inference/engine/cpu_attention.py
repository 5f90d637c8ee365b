"""Latent attention of the engine on the CPU: each token attends to the cache by products of fixed shapes.

A generated token is computed alone, a prompt in blocks of one page whose first position is a multiple of `PAGE`. So
the shapes of the products of a token follow from its position, and its result from its own sequence.

Axes: M rows, N tokens among them, D model width, H heads, N qk_nope in `w_uk_HNC`, R qk_rope, C kv rank, L = C + R,
K = N + R, Q q rank, V v_head, T cached tokens, P = R/2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.inference.engine.invariant_ops import RmsNorm, rotate, transposed
from deepseek_v3.inference.engine.rows import Rows
from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.ops.mla_decode.formats import PAGE

Attend = Callable[["CpuAttention", Tensor, Rows], Tensor]


class CpuAttention:
    """The attention of one layer, over the pages of a pool.

    It holds tensors as attributes, because reading a parameter of a module takes longer than a small product.
    """

    def __init__(self, module: MultiHeadLatentAttention, pool: PagePool, dtype: torch.dtype) -> None:
        config = module.config
        self.pool, self.layer, self.scale = pool, module.layer, torch.tensor(module.scale)
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.wide = torch.promote_types(dtype, torch.float32)
        self.compression: tuple[Tensor, RmsNorm] | None = None
        if config.q_lora_rank is not None:
            self.compression = transposed(module.q_a_proj, dtype), RmsNorm(module.q_a_layernorm)
        self.q = transposed(module.q_proj if self.compression is None else module.q_b_proj, dtype)
        self.kv_a, self.o = transposed(module.kv_a_proj_with_mqa, dtype), transposed(module.o_proj, dtype)
        self.kv_norm = RmsNorm(module.kv_a_layernorm)
        self.w_uk_HNC, w_uv_HVC = module.absorbed_weights(dtype)
        self.w_uv_HCV = w_uv_HVC.transpose(1, 2)

    def __call__(self, x_MD: Tensor, rows: Rows, turns_M21R: Tensor, attend: Attend) -> Tensor:
        """Stores the latents of the tokens in the cache and attends to it; (M, D)."""
        latent_MC, key_MR = torch.mm(x_MD, self.kv_a).split_with_sizes((self.rank, self.rope), -1)
        q_nope_MHN, q_rope_MHR = self._queries(x_MD).split_with_sizes((self.nope, self.rope), -1)
        # One rotation, of the queries of all heads and of the key as one more head, takes half the time of two.
        rotated_MHR = rotate(torch.cat((q_rope_MHR, key_MR.unsqueeze(1)), dim=1), turns_M21R)
        self._write(latent_MC, rotated_MHR[:, self.heads], rows)
        q_latent_HMC = torch.bmm(q_nope_MHN.transpose(0, 1), self.w_uk_HNC)
        q_MHL = torch.cat((q_latent_HMC.transpose(0, 1), rotated_MHR[:, : self.heads]), dim=-1)
        q_MHL = (q_MHL if q_MHL.dtype == self.wide else q_MHL.to(self.wide)).mul_(self.scale)
        out_HMV = torch.bmm(attend(self, q_MHL, rows).to(x_MD.dtype).transpose(0, 1), self.w_uv_HCV)
        return torch.mm(out_HMV.transpose(0, 1).flatten(1), self.o)

    def _queries(self, x_MD: Tensor) -> Tensor:
        """The query of every head, neither absorbed nor rotated; (M, H, K)."""
        if self.compression is not None:
            weight_DQ, norm = self.compression
            x_MD = norm(torch.mm(x_MD, weight_DQ))
        return torch.mm(x_MD, self.q).view(x_MD.shape[0], self.heads, self.nope + self.rope)

    def _write(self, latent_MC: Tensor, key_MR: Tensor, rows: Rows) -> None:
        """Stores normalised latents and rotated keys in the rows of their tokens."""
        packed = self.pool.layout.pack(self.kv_norm(latent_MC), key_MR)[: rows.number]
        self.pool.pages[self.layer].flatten(0, 1).index_copy_(0, rows.slots_N, packed)

    def cached(self, rows: Rows, index: int) -> Tensor:
        """The cached rows of a chunk's sequence up to the chunk's end, (T, L), in float32 or wider."""
        return rows.cached[index].read(self.pool, self.layer, self.wide)


def attend_alone(attention: CpuAttention, q_MHL: Tensor, rows: Rows) -> Tensor:
    """Attends from chunks of one token; (M, H, C)."""
    out_MHC = q_MHL.new_zeros(*q_MHL.shape[:2], attention.rank)
    for index in range(rows.number):
        cached_TL = attention.cached(rows, index)
        weights_HT = torch.mm(q_MHL[index], cached_TL.t()).softmax(-1)
        torch.mm(weights_HT, cached_TL[:, : attention.rank], out=out_MHC[index])
    return out_MHC


def attend_block(attention: CpuAttention, q_MHL: Tensor, rows: Rows) -> Tensor:
    """Attends from chunks that each begin a page and end in it; (M, H, C)."""
    out_MHC = q_MHL.new_zeros(*q_MHL.shape[:2], attention.rank)
    hidden_QK = torch.ones(PAGE, PAGE, dtype=torch.bool).triu(1)
    first = 0
    for index, chunk in enumerate(rows.chunks):
        last = first + len(chunk.ids)
        q_QHL = q_MHL.new_zeros(PAGE, *q_MHL.shape[1:])
        q_QHL[: last - first] = q_MHL[first:last]
        cached_TL = q_MHL.new_zeros(chunk.start + PAGE, q_MHL.shape[-1])
        cached_TL[: chunk.end] = attention.cached(rows, index)
        scores_QHT = torch.mm(q_QHL.flatten(0, 1), cached_TL.t()).unflatten(0, (PAGE, -1))
        scores_QHT[..., chunk.start :].masked_fill_(hidden_QK[:, None], float("-inf"))
        weights_XT = scores_QHT.softmax(-1).flatten(0, 1)
        out_QHC = torch.mm(weights_XT, cached_TL[:, : attention.rank]).unflatten(0, (PAGE, -1))
        out_MHC[first:last] = out_QHC[: last - first]
        first = last
    return out_MHC

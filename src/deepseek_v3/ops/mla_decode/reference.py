"""Absorbed latent attention over a paged cache, and writing to the cache, in plain torch.

Every head reads the same cached row: its first C numbers are the normalised latent, which is both key and value;
its other R numbers are the rotated key that all heads share (DeepSeek-V2 report, §2.1.3 and appendix C).

Axes: B batch, S new tokens, H heads, M pages of a sequence, P pages, K cached tokens (M pages of `PAGE`), C kv
rank, R rotary width, L = C + R, N rows, Z = R/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.rms_norm import rms_norm
from deepseek_v3.ops.rotary import rotate


def mla_decode(
    q_BSHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, layout: LatentFormat, scale: float
) -> tuple[Tensor, Tensor]:
    """Attends from the last S tokens of each sequence to its cached rows up to their own.

    `q_BSHL`: absorbed queries, any float type. `pages`: those of one layer, as `layout` stores them. `table_BM`
    int32: the pages of each sequence in order; entries behind its last page may be anything. `lengths_B` int32:
    cached tokens, the S new ones included. Query s of S sees the rows before `length - (S - 1 - s)`.

    Returns the output (B, S, H, C) in the type of `q_BSHL`, and the natural logarithm of the sum of the
    exponentiated scores (B, S, H) in float32. A query that sees no row gives zeros and -inf. Rows that no query
    sees may hold any values, even NaN. Scores, softmax and sums are computed in float32 (float64 for float64).
    """
    queries = q_BSHL.shape[1]
    wide = torch.promote_types(q_BSHL.dtype, torch.float32)
    place_K = torch.arange(table_BM.shape[1] * PAGE, device=q_BSHL.device)
    cached_BK = place_K < lengths_B[:, None]
    last_BS = lengths_B[:, None] - queries + torch.arange(queries, device=q_BSHL.device)
    visible_BSK = place_K <= last_BS[..., None]
    pages_BM = table_BM.long().where(cached_BK[:, ::PAGE], 0)
    rows_BKL = layout.unpack(pages[pages_BM].flatten(1, 2), wide).masked_fill(~cached_BK[..., None], 0)
    scores_BSHK = torch.einsum("bshl,bkl->bshk", q_BSHL.to(wide), rows_BKL) * scale
    scores_BSHK = scores_BSHK.masked_fill(~visible_BSK[:, :, None], float("-inf"))
    sums_BSH = scores_BSHK.logsumexp(-1)
    weights_BSHK = (scores_BSHK - sums_BSH.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    out_BSHC = torch.einsum("bshk,bkc->bshc", weights_BSHK, rows_BKL[..., : layout.rank])
    return out_BSHC.to(q_BSHL.dtype), sums_BSH.float()


def write_latents(
    pages: Tensor,
    slots_N: Tensor,
    kv_NL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_NZ: Tensor,
    sin_NZ: Tensor,
    layout: LatentFormat,
) -> None:
    """Normalises latents, rotates keys, and stores both in the rows of their tokens.

    `kv_NL` any float type: what the projection `kv_a_proj_with_mqa` returns. `slots_N` int64: page · `PAGE` + row;
    a negative slot is padding and is not written. `norm_C`: the weight of the latent's norm. `cos_NZ`, `sin_NZ`
    float32 from `rotary_tables`.
    """
    latent_NC, rope_NR = kv_NL.split((layout.rank, layout.rope), -1)
    latent_NC = rms_norm(latent_NC, norm_C, eps)
    rope_NR = rotate(rope_NR[:, None, None], cos_NZ[:, None], sin_NZ[:, None]).flatten(1)
    rows = layout.pack(latent_NC, rope_NR)
    written_N = slots_N >= 0
    pages.flatten(0, 1)[slots_N[written_N]] = rows[written_N]

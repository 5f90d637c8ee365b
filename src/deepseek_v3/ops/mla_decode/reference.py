"""Absorbed latent attention, in plain torch.

Every head reads the same cached row: its first C numbers are the normalised latent, which serves as key and
as value; the other R are the rotated key that all heads share.
"""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def mla_decode(q_BSHL: Tensor, cache_BTL: Tensor, positions_BS: Tensor, value_width: int, scale: float) -> Tensor:
    """Attends from queries to the cached rows at or before their positions; (B, S, H, value_width).

    `q_BSHL` (batch, new tokens, heads, L = C + R); `cache_BTL` (batch, capacity, L); `positions_BS` int64, the
    position of each query, which also says how many rows of the cache it may read. Rows beyond are never
    used, whatever they hold. Scores and softmax in float32 (float64 for float64).
    """
    steps_T = torch.arange(cache_BTL.shape[1], device=cache_BTL.device)
    visible_BST = steps_T <= positions_BS[..., None]
    written_BT = visible_BST.any(1)
    rows_BTL = at_least_float32(cache_BTL).masked_fill(~written_BT[..., None], 0)
    scores_BSHT = torch.einsum("bshl,btl->bsht", at_least_float32(q_BSHL), rows_BTL) * scale
    weights_BSHT = scores_BSHT.masked_fill(~visible_BST[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("bsht,btc->bshc", weights_BSHT, rows_BTL[..., :value_width]).to(q_BSHL.dtype)

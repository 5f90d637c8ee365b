"""Absorbed latent attention, in plain torch.

Every head reads the same cached row: its first C numbers are the normalised latent, which is both key and value;
its other R numbers are the rotated key that all heads share.

Axes: B batch, S new tokens, T cached tokens, H heads, L = C + R width of a cached row.
"""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def mla_decode(q_BSHL: Tensor, cache_BTL: Tensor, positions_BS: Tensor, value_width: int, scale: float) -> Tensor:
    """Attends from each query to the cached rows at or before its position; (B, S, H, value_width), type of `q`.

    `positions_BS` int64. Rows after the last position may hold any values, even NaN: they are never used.
    Scores and softmax are computed in float32 (float64 for float64).
    """
    steps_T = torch.arange(cache_BTL.shape[1], device=cache_BTL.device)
    visible_BST = steps_T <= positions_BS[..., None]
    written_BT = visible_BST.any(1)
    rows_BTL = at_least_float32(cache_BTL).masked_fill(~written_BT[..., None], 0)
    scores_BSHT = torch.einsum("bshl,btl->bsht", at_least_float32(q_BSHL), rows_BTL) * scale
    weights_BSHT = scores_BSHT.masked_fill(~visible_BST[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("bsht,btc->bshc", weights_BSHT, rows_BTL[..., :value_width]).to(q_BSHL.dtype)

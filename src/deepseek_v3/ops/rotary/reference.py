"""Rotary position embedding (arXiv:2104.09864) of interleaved pairs, as the released weights expect it.

Axes: B batch, S sequence, H heads, N width without position, R rotary width, P = R/2 pairs, V value width,
K = N + R, X = N + V.
"""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def rotate(x_BSHR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor) -> Tensor:
    """Rotates each pair (x[2p], x[2p+1]) by the angle with the given cosine and sine.

    `x_BSHR` (batch, sequence, heads, R); `cos_BSP`, `sin_BSP` (batch or 1, sequence, R/2) float32.
    Computed in float32 (float64 for float64), returned in the type of `x_BSHR`.
    """
    even, odd = at_least_float32(x_BSHR).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BSP.unsqueeze(-2), sin_BSP.unsqueeze(-2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BSHR.dtype)


def join_heads(
    q_BSHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, S, H, K), keys (B, S, H, K) and values (B, S, H, V) that attention multiplies.

    Rotates the last R of each query's K numbers, and `k_rope_BSR`, which is the rotary part of every head's key. A
    head of `kv_BSHX` holds the N other numbers of its key, and then its value.
    """
    rope = k_rope_BSR.shape[-1]
    nope = q_BSHK.shape[-1] - rope
    q_nope_BSHN, q_rope_BSHR = q_BSHK.split((nope, rope), -1)
    k_nope_BSHN, v_BSHV = kv_BSHX.split((nope, kv_BSHX.shape[-1] - nope), -1)
    k_rope_BSHR = rotate(k_rope_BSR.unsqueeze(2), cos_BSP, sin_BSP).expand(-1, -1, q_BSHK.shape[2], -1)
    q_BSHK = torch.cat((q_nope_BSHN, rotate(q_rope_BSHR, cos_BSP, sin_BSP)), dim=-1)
    return q_BSHK, torch.cat((k_nope_BSHN, k_rope_BSHR), dim=-1), v_BSHV

"""Rotary position embedding (arXiv:2104.09864) of interleaved pairs, as the released weights expect it."""

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

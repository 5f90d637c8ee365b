"""Root-mean-square normalisation (arXiv:1910.07467), in plain torch."""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x` (..., D) divided by its root mean square over the last axis, times `weight_D`; in the type of `x`.

    Computed in float32 (float64 for float64) and rounded once.
    """
    wide = at_least_float32(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight_D.to(wide.dtype)).to(x.dtype)

"""The product of a linear layer, in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x · weightᵀ, (..., I) to (..., O), computed in the type of `x`."""
    return F.linear(x, weight_OI.to(x.dtype))

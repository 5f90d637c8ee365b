"""The product of the router, in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x · weightᵀ, (T, E), computed and returned in float32, in float64 for float64; inputs of any float types."""
    x_TD = at_least_float32(x_TD)
    return F.linear(x_TD, weight_ED.to(x_TD.dtype))

"""SwiGLU (arXiv:2002.05202), in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) · up, times an optional `weight` that broadcasts against them; in the type of `gate`.

    Computed in float32 (float64 for float64) and rounded once.
    """
    product = F.silu(at_least_float32(gate)) * at_least_float32(up)
    if weight is not None:
        product = product * weight
    return product.to(gate.dtype)

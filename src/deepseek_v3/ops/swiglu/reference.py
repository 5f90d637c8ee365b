"""SwiGLU (arXiv:2002.05202), in plain torch.

Axes: X rows, F width of gate, up and result, G = 2·F.
"""

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


def packed_swiglu(gate_up_XG: Tensor, weights_X: Tensor) -> Tensor:
    """`swiglu` of rows whose first half is the gate and whose second half is up, with a weight for each row."""
    gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
    return swiglu(gate_XF, up_XF, weights_X[:, None])

"""The float type in which sums, softmax and losses are computed, and products that are summed and kept in it."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is already float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_in_float32(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a · b of two bfloat16 matrices, summed in float32 and not rounded to bfloat16."""
    if a_MK.is_cuda:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()

"""The experts' matrix products: one weight per group of rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_v3.ops.grouped_gemm.reference import grouped_linear as reference_grouped_linear
from deepseek_v3.ops.grouped_gemm.torch_grouped import grouped_linear as torch_grouped_linear

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = ["GroupedLinear", "fastest_grouped_linear", "reference_grouped_linear", "torch_grouped_linear"]


def fastest_grouped_linear(device: torch.device, dtype: torch.dtype, *row_widths: int) -> GroupedLinear:
    """The back end for rows of these widths: the grouped kernel for bfloat16 on CUDA, the loop elsewhere."""
    fits_kernel = dtype == torch.bfloat16 and all(width % 8 == 0 for width in row_widths)
    if device.type == "cuda" and fits_kernel:
        return torch_grouped_linear
    return reference_grouped_linear

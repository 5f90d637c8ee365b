"""Matrices in 8-bit floating point with one scale per block (DeepSeek-V3 report, §3.3), in plain torch.

Rows, such as activations, have a scale for each 1×128 block; weights have one for each 128×128 block.

Axes: T rows, D width, G blocks of 128 numbers of a row (the last one may be shorter), N numbers of a block, V rows
of a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.fp8.formats import BLOCK, E4M3

_LARGEST = torch.finfo(E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_1x128(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes rows (T, D) of any float type to (T, D) e4m3 and scales (T, G) float32; their product is about `x`.

    The largest number of a block becomes 448. The error of a number is at most 1/16 of it, or 2⁻¹⁰ of the scale for
    a number below 2⁻⁶ of the scale. One number that is not finite turns its whole block into NaN.
    """
    x_TGN = _in_blocks(x_TD.float())
    # A normal number at least: blocks of zeros are divided by it, and GPUs may flush smaller numbers to zero.
    scales_TG = (x_TGN.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    quantized_TGN = (x_TGN / scales_TG.unsqueeze(-1)).to(E4M3)
    return quantized_TGN.flatten(1)[:, : x_TD.shape[1]].contiguous(), scales_TG


def dequantize_1x128(quantized_TD: Tensor, scales_TG: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows (T, D) in `dtype`: each number times the scale of its block."""
    x_TGN = _in_blocks(quantized_TD.float()) * scales_TG.unsqueeze(-1)
    return x_TGN.flatten(1)[:, : quantized_TD.shape[1]].to(dtype)


def quantize_128x128(w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (V, D) of any float type to (V, D) e4m3 and scales (V / 128, D / 128) float32, rounded up.

    The errors are those of `quantize_1x128`, by blocks of 128×128 numbers. One number that is not finite turns its
    whole block into NaN.
    """
    rows, width = w_VD.shape
    w_BND = F.pad(w_VD.float(), (0, -width % BLOCK, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    w_BNGN = w_BND.unflatten(2, (-1, BLOCK))
    scales_BG = (w_BNGN.abs().amax((1, 3)) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    quantized_BNGN = (w_BNGN / scales_BG[:, None, :, None]).to(E4M3)
    return quantized_BNGN.flatten(2).flatten(0, 1)[:rows, :width].contiguous(), scales_BG


def dequantize_128x128(quantized_VD: Tensor, scales: Tensor, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """A weight (V, D) in `dtype`, from e4m3 and one scale per 128×128 block, the format of released checkpoints.

    `scales` has any float type and the shape (V / 128, D / 128), rounded up: the last blocks may be smaller. If
    `quantized_VD` holds only some rows of the weight, from `first_row` on, `scales` are those of the whole weight.
    """
    last_row = first_row + quantized_VD.shape[0]
    blocks = slice(first_row // BLOCK, -(-last_row // BLOCK))
    scales_VG = scales[blocks].float().repeat_interleave(BLOCK, dim=0)
    scales_VG = scales_VG[first_row % BLOCK :][: quantized_VD.shape[0]]
    return dequantize_1x128(quantized_VD, scales_VG, dtype)


def _in_blocks(x_TD: Tensor) -> Tensor:
    return F.pad(x_TD, (0, -x_TD.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))

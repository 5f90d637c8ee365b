"""Matrices in 8-bit floating point with one scale per block (DeepSeek-V3 report, §3.3), in plain torch.

Activations and their gradients have a scale for each block of 128 numbers of a row or of a column; weights have one
for each 128×128 block. A scale is the largest magnitude of its block over 448, or, with `power_of_two`, the next
power of two that is not smaller. A value is its number times the float32 reciprocal of the scale, rounded to the
nearest, ties to even. So its error is at most 1/16 of the number, or 2⁻¹⁰ of the scale for a number below 2⁻⁶ of
the scale. One number that is not finite turns its whole block into NaN. Inputs have any float type; float64 is
rounded to float32 first.

Axes: T, R, X rows, D width, G blocks of 128 numbers of a row (the last one may be shorter), N numbers of a block,
E experts, P places of rows along a column, B blocks of 128 places, V rows of a weight, O and I its output and input
width, F width of the hidden layer of a feed-forward network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.ops.fp8.formats import (
    BLOCK,
    E4M3,
    ColumnBlocks,
    RowBlocks,
    WeightBlocks,
    group_starts,
    padded_places,
)

_LARGEST = torch.finfo(E4M3).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_1x128(x_TD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes rows (T, D) of any float type to (T, D) e4m3 and scales (T, G) float32."""
    x_TGN = _in_blocks(x_TD.float())
    scales_TG = _scales(x_TGN.abs().amax(-1), power_of_two)
    quantized_TGN = (x_TGN * scales_TG.reciprocal().unsqueeze(-1)).to(E4M3)
    return quantized_TGN.flatten(1)[:, : x_TD.shape[1]].contiguous(), scales_TG


def dequantize_1x128(quantized_TD: Tensor, scales_TG: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows (T, D) in `dtype`: each number times the scale of its block, multiplied in float32 or float64."""
    wide = torch.promote_types(dtype, torch.float32)
    x_TGN = _in_blocks(quantized_TD.to(wide)) * scales_TG.unsqueeze(-1)
    return x_TGN.flatten(1)[:, : quantized_TD.shape[1]].to(dtype)


def quantize_128x128(w_VD: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (V, D) of any float type to (V, D) e4m3 and scales (V / 128, D / 128) float32.

    The numbers of blocks are rounded up.
    """
    rows, width = w_VD.shape
    w_BND = F.pad(w_VD.float(), (0, -width % BLOCK, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    w_BNGN = w_BND.unflatten(2, (-1, BLOCK))
    scales_BG = _scales(w_BNGN.abs().amax((1, 3)), power_of_two)
    quantized_BNGN = (w_BNGN * scales_BG.reciprocal()[:, None, :, None]).to(E4M3)
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


def dequantize_columns(columns: ColumnBlocks, dtype: torch.dtype) -> Tensor:
    """The transposed matrix (D, P) in `dtype`; behind the last group it is as undefined as its source."""
    return dequantize_1x128(columns.values_DP, columns.scales_BD.T, dtype)


def dequantize_weight(weight: WeightBlocks, dtype: torch.dtype) -> Tensor:
    """The weights (E, O, I) in `dtype`."""
    experts = zip(weight.values_EOI, weight.scales, strict=True)
    return torch.stack([dequantize_128x128(values_OI, scales, dtype) for values_OI, scales in experts])


def quantize_rows(x_TD: Tensor, power_of_two: bool) -> RowBlocks:
    """Quantizes each row in blocks of 128 numbers."""
    return RowBlocks(*quantize_1x128(x_TD, power_of_two))


def quantize_columns(x_TD: Tensor, power_of_two: bool) -> ColumnBlocks:
    """Quantizes each column in blocks of 128 rows, which form one group."""
    values_DP, scales_DB = quantize_1x128(F.pad(x_TD, (0, 0, 0, -len(x_TD) % BLOCK)).T, power_of_two)
    return ColumnBlocks(values_DP, _contiguous_transpose(scales_DB))


def quantize_both(x_TD: Tensor, power_of_two: bool) -> tuple[RowBlocks, ColumnBlocks]:
    """`quantize_rows` and `quantize_columns` of the same rows."""
    return quantize_rows(x_TD, power_of_two), quantize_columns(x_TD, power_of_two)


def gather_rows(rows: RowBlocks, source_X: Tensor) -> RowBlocks:
    """Copies of the rows `source_X`, an integer each, with their scales."""
    return RowBlocks(rows.values_XD.view(torch.uint8)[source_X].view(E4M3), rows.scales_XG[source_X])


def gather_columns(x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool) -> ColumnBlocks:
    """Quantizes the columns of the rows `x_RD[source_X]`, of which expert e has ends[e-1] … ends[e]-1."""
    rows_X = torch.arange(len(source_X), device=ends_E.device, dtype=ends_E.dtype)
    padding_E = group_starts(ends_E) - F.pad(ends_E[:-1], (1, 0))  # before each group
    places_X = rows_X + padding_E[torch.searchsorted(ends_E, rows_X, right=True)]
    x_PD = x_RD.new_zeros(padded_places(len(source_X), len(ends_E)), x_RD.shape[1])
    return quantize_columns(x_PD.index_copy(0, places_X.long(), x_RD[source_X]), power_of_two)


def requantize_columns(
    rows: RowBlocks, source_X: Tensor, ends_E: Tensor, power_of_two: bool, dtype: torch.dtype
) -> ColumnBlocks:
    """`gather_columns` of the rows that `rows` holds, rounded to `dtype`."""
    return gather_columns(dequantize_1x128(*rows, dtype), source_X, ends_E, power_of_two)


def quantize_weight(w_EOI: Tensor, power_of_two: bool) -> tuple[WeightBlocks, WeightBlocks]:
    """Quantizes weights in blocks of 128×128 numbers; returns them and their transposes (E, I, O)."""
    experts = [quantize_128x128(w_OI, power_of_two) for w_OI in w_EOI]
    values_EOI, scales = (torch.stack(parts) for parts in zip(*experts, strict=True))
    transposed_EIO = _contiguous_transpose(values_EOI.view(torch.uint8)).view(E4M3)
    return WeightBlocks(values_EOI, scales), WeightBlocks(transposed_EIO, _contiguous_transpose(scales))


def swiglu(gate_up_XG2: Tensor, gates_X: Tensor | None, power_of_two: bool) -> tuple[RowBlocks, RowBlocks]:
    """silu(gate) · up · gates_X, quantized (X, F), and the quantized input (X, 2F) for the backward pass.

    `gate_up_XG2` (X, 2F) holds gate in its first half and up in its second. `gates_X` float32 holds the router's
    weight of each row; None means 1. Computed in float32 (float64 for float64).
    """
    hidden_XF = swiglu_hidden(gate_up_XG2, gates_X)
    return quantize_rows(hidden_XF, power_of_two), quantize_rows(gate_up_XG2, power_of_two)


def swiglu_hidden(gate_up_XG2: Tensor, gates_X: Tensor | None) -> Tensor:
    """What `swiglu` quantizes first."""
    gate_XF, up_XF = at_least_float32(gate_up_XG2).chunk(2, -1)
    hidden_XF = F.silu(gate_XF) * up_XF
    return hidden_XF if gates_X is None else hidden_XF * gates_X.unsqueeze(-1)


def swiglu_backward(
    kept: RowBlocks, grad_hidden_XF: Tensor, gates_X: Tensor | None, ends_E: Tensor | None, power_of_two: bool
) -> tuple[RowBlocks, ColumnBlocks, ColumnBlocks, Tensor | None]:
    """The backward pass of `swiglu`, from the input that it kept and the gradient of its first result.

    Returns the gradient of the input, quantized by rows (X, 2F) and by columns (2F, P); the recomputed hidden
    layer by columns (F, P); and the gradient of `gates_X`, float32, None without gates. `ends_E` None means one
    group of rows. Computed in float32 (float64 if `grad_hidden_XF` is).
    """
    grad_XG2, hidden_XF, grad_gates_X = swiglu_gradients(kept, grad_hidden_XF, gates_X)
    rows_X = torch.arange(len(grad_XG2), device=grad_XG2.device)
    if ends_E is None:
        ends_E = torch.full((1,), len(grad_XG2), dtype=torch.int32, device=grad_XG2.device)
    grad_columns = gather_columns(grad_XG2, rows_X, ends_E, power_of_two)
    hidden_columns = gather_columns(hidden_XF, rows_X, ends_E, power_of_two)
    return quantize_rows(grad_XG2, power_of_two), grad_columns, hidden_columns, grad_gates_X


def swiglu_gradients(
    kept: RowBlocks, grad_hidden_XF: Tensor, gates_X: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `swiglu_backward` quantizes, gradient (X, 2F) and hidden layer (X, F); and the gradient of `gates_X`."""
    grad_XF = at_least_float32(grad_hidden_XF)
    gate_XF, up_XF = dequantize_1x128(*kept, grad_XF.dtype).chunk(2, -1)
    sigmoid_XF = torch.sigmoid(gate_XF)
    silu_XF = gate_XF * sigmoid_XF
    hidden_XF = silu_XF * up_XF
    grad_gates_X = None
    if gates_X is not None:
        grad_gates_X = (grad_XF * hidden_XF).sum(-1, dtype=grad_XF.dtype).float()
        grad_XF, hidden_XF = grad_XF * gates_X.unsqueeze(-1), hidden_XF * gates_X.unsqueeze(-1)
    grad_gate_XF = grad_XF * up_XF * (sigmoid_XF * (1 + gate_XF * (1 - sigmoid_XF)))
    return torch.cat([grad_gate_XF, grad_XF * silu_XF], dim=-1), hidden_XF, grad_gates_X


def _scales(largest: Tensor, power_of_two: bool) -> Tensor:
    # A normal number at least, whose reciprocal is finite; GPUs may flush smaller numbers to zero.
    # On a GPU, torch divides by a tensor as IEEE 754 says, and by a number through its rounded reciprocal.
    scales = (largest / torch.full_like(largest, _LARGEST)).clamp(min=_SMALLEST_SCALE)
    if not power_of_two:
        return scales
    # A float32 is a power of two if all bits of its fraction are zero; adding ones there carries into the exponent.
    fraction = (1 << 23) - 1
    rounded_up = ((scales.view(torch.int32) + fraction) & ~fraction).view(torch.float32)
    return torch.where(scales.isnan(), scales, rounded_up)


def _in_blocks(x_TD: Tensor) -> Tensor:
    return F.pad(x_TD, (0, -x_TD.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _contiguous_transpose(x: Tensor) -> Tensor:
    return x.mT.contiguous()

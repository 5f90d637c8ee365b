"""Compares every variant of the product kernel with the reference in float64, on random matrices on a GPU.

Axes: X rows, E experts, O output width, I input width, P places.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek_v3.ops import fp8
from deepseek_v3.ops.fp8 import BLOCK, E4M3, ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.fp8_gemm import Fp8Gemm, cuda, reference
from deepseek_v3.ops.operation import multiprocessors

# Errors as shares of the sum of the products' magnitudes. Hopper's tensor cores cut each of 32 products, and the
# sum so far, off at 2^-13 of the largest of them. So an error is at most 33 times that. In a model of them the root
# mean square is 0.65 times, and the largest of half a million 9 times, because a few products exceed all others.
_LARGEST, _ROOT_MEAN_SQUARE = 33 * 2.0**-13, 2.0**-12
_DEPTH = 400  # numbers that are summed: more than three blocks
_DTYPES = (torch.bfloat16, torch.float32)


def check(device: torch.device, gemm: Fp8Gemm = cuda, wide_rows: int | None = None) -> Iterator[tuple[str, bool]]:
    """Yields the name of each comparison, and whether the results agree.

    With `wide_rows` rows, products of 256 columns have a tile of 128 × 256 for every multiprocessor, and take tiles
    of that size. None stands for that number on the device; it includes a tile that a group does not fill.
    """
    torch.manual_seed(0)
    if wide_rows is None:
        wide_rows = BLOCK * (multiprocessors(device) - 1)
    for rows, columns in ((300, 144), (wide_rows, 256)):
        for dtype in _DTYPES:
            name = f"{rows:,} × {columns} in {str(dtype).removeprefix('torch.')}"
            yield f"rows_product, {name}", _rows_agree(gemm, device, rows, columns, dtype)
            yield f"columns_product, {name}", _columns_agree(gemm, device, rows, columns, dtype)


def _rows_agree(gemm: Fp8Gemm, device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Of three groups of rows; the second one is empty."""
    ends_E = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32, device=device)
    a = fp8.reference.quantize_rows(_numbers(device, rows, _DEPTH), False)
    w, _ = fp8.reference.quantize_weight(_numbers(device, 3, columns, _DEPTH), False)
    found = gemm.rows_product(a, w, ends_E, dtype)
    exact = reference.rows_product(a, w, ends_E, torch.float64)
    a = RowBlocks(_magnitudes(a.values_XD), a.scales_XG)
    w = WeightBlocks(_magnitudes(w.values_EOI), w.scales)
    return _agree(found, exact, reference.rows_product(a, w, ends_E, torch.float64))


def _columns_agree(gemm: Fp8Gemm, device: torch.device, output: int, width: int, dtype: torch.dtype) -> bool:
    """Of one group, whose length `num_rows` is no multiple of a block."""
    ends_E = torch.tensor([_DEPTH], dtype=torch.int32, device=device)
    a, b = (fp8.reference.quantize_columns(_numbers(device, _DEPTH, size), False) for size in (output, width))
    found = gemm.columns_product(a, b, ends_E, _DEPTH, dtype)
    exact = reference.columns_product(a, b, ends_E, _DEPTH, torch.float64)
    a, b = (ColumnBlocks(_magnitudes(each.values_DP), each.scales_BD) for each in (a, b))
    return _agree(found, exact, reference.columns_product(a, b, ends_E, _DEPTH, torch.float64))


def _numbers(device: torch.device, *shape: int) -> Tensor:
    """Rows of different sizes, so that a wrong scale shows."""
    return torch.randn(shape, device=device) * torch.exp(torch.randn(*shape[:-1], 1, device=device))


def _magnitudes(values: Tensor) -> Tensor:
    return values.float().abs().to(E4M3)


def _agree(found: Tensor, exact: Tensor, magnitudes: Tensor) -> bool:
    if found.shape != exact.shape:
        return False
    rounding = torch.finfo(found.dtype).eps / 2 * exact.abs()
    errors = ((found.double() - exact).abs() - rounding).clamp(min=0)
    share = torch.where(errors == 0, 0, errors / magnitudes)
    return bool(share.amax() <= _LARGEST and share.square().mean().sqrt() <= _ROOT_MEAN_SQUARE)

"""Sums of rows without a table of all copies in between: every row is read once, and every sum written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 1024  # of one program


def sum_rows(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
    """The sums (T, D), in float32 and rounded once, of the rows that T lists name; X and above name none."""
    rows_XD = rows_XD if rows_XD.stride(1) == 1 else rows_XD.contiguous()
    (number, width), (sums, most) = rows_XD.shape, slots_TM.shape
    out_TD = torch.empty(sums, width, dtype=rows_XD.dtype, device=rows_XD.device)
    if out_TD.numel():
        columns = min(_MOST_COLUMNS, triton.next_power_of_2(width))
        grid = (sums, triton.cdiv(width, columns))
        _sum_rows_kernel[grid](
            rows_XD, slots_TM.contiguous(), out_TD, number, width, rows_XD.stride(0), MOST=most, COLUMNS=columns
        )
    return out_TD


@triton.jit
def _sum_rows_kernel(
    rows,
    slots,
    out,
    number,
    width,
    stride,
    MOST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for place in range(MOST):
        slot = tl.load(slots + row * MOST + place)
        inside = (column < width) & (slot < number)
        total += tl.load(rows + slot * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=column < width)

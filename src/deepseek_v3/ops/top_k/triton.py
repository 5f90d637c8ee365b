"""The largest numbers of short rows: a few rows in the registers of a program, and the largest taken k times.

Axes: T rows, E numbers of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.operation import custom_op, fake_of

_NUMBERS = 2048  # numbers of one program


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The reference's `top_k` for float32. Of equal numbers the one with the lower column comes first."""
    return _top_k(scores_TE.detach(), k)


@custom_op("top_k")
def _top_k(scores_TE: Tensor, k: int) -> Tensor:
    scores_TE = scores_TE.contiguous()
    (rows, width), columns_TK = scores_TE.shape, _empty_columns(scores_TE, k)
    if columns_TK.numel():
        columns = triton.next_power_of_2(width)
        per_program = max(1, _NUMBERS // columns)
        grid = (triton.cdiv(rows, per_program),)
        _top_k_kernel[grid](scores_TE, columns_TK, rows, width, K=k, ROWS=per_program, COLUMNS=columns)
    return columns_TK


@fake_of(_top_k)
def _empty_columns(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], k, dtype=torch.int64)


@triton.jit(do_not_specialize=["rows"])
def _top_k_kernel(scores, out, rows, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    score = tl.load(scores + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    score = tl.where(score == 0, 0.0, score)  # -0 equals 0
    # Bits whose order as integers is that of the numbers; below them the column, the lowest as the largest.
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) + (COLUMNS - 1 - column)[None, :]
    taken = -0x7FFFFFFFFFFFFFFF
    key = tl.where(inside, key, taken)
    for place in range(K):
        largest = tl.max(key, 1)
        chosen = COLUMNS - 1 - (largest & 0xFFFFFFFF)
        tl.store(out + row * K + place, chosen, mask=row < rows)
        key = tl.where(key == largest[:, None], taken, key)

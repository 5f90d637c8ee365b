"""Products of matrices in 8-bit blocks, group by group in plain torch (DeepSeek-V3 report, §3.3.2).

A product is a sum over the blocks of K, the axis that is summed over: scale · scale · (the sum within a block).
Every back end adds the blocks in float32; tensor cores may keep fewer bits within a block. The reference multiplies
the dequantized operands in float32, or in float64 if that is the type of the result.

Axes: X rows in expert order, E experts, O output width, I input width, P places.
"""

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import (
    BLOCK,
    ColumnBlocks,
    RowBlocks,
    WeightBlocks,
    dequantize_1x128,
    dequantize_columns,
    dequantize_weight,
)


def rows_product(
    a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows ends[e-1] … ends[e]-1 of `a` (X, I) times the transpose of weight e (O, I); (X, O) in `dtype`.

    `ends_E` int32, not decreasing, the last one equal to X; a group may be empty. None stands for one group of all
    rows. The forward pass multiplies with the weight; the gradient of the input is the product of the gradient's
    rows and the transposed weight.
    """
    rows_XI, weight_EOI = dequantize_1x128(*a, _wide(dtype)), dequantize_weight(w, _wide(dtype))
    groups = rows_XI.split(_sizes(ends_E, len(rows_XI)))
    return torch.cat([rows @ weight.T for rows, weight in zip(groups, weight_EOI, strict=True)]).to(dtype)


def columns_product(
    a: ColumnBlocks, b: ColumnBlocks, ends_E: Tensor | None, num_rows: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The gradient of each group's weight: a_e (O, its places) times the transpose of b_e (I, its places).

    (E, O, I) in `dtype`; a group without rows has zeros. `a` holds the gradient of the product's rows, `b` the rows
    that were multiplied; both hold `num_rows` rows, whose groups end at `ends_E`, as in `rows_product`.
    """
    a_OP, b_IP = (dequantize_columns(columns, _wide(dtype)) for columns in (a, b))
    products, start = [], 0
    for size in _sizes(ends_E, num_rows):
        products.append(a_OP[:, start : start + size] @ b_IP[:, start : start + size].T)
        start += -(-size // BLOCK) * BLOCK
    return torch.stack(products).to(dtype)


def _sizes(ends_E: Tensor | None, num_rows: int) -> list[int]:
    return [num_rows] if ends_E is None else ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

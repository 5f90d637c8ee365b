"""Products of matrices in 8-bit blocks on a Hopper GPU, in Triton.

Program p of N computes tiles p, p + N, p + 2N … of the result. Through tensor descriptors the GPU's copy engine
(TMA) loads the operands, several blocks of K ahead, and stores every tile that lies within its group; the last rows
of a group are stored under a mask. Programs find the group of a tile on the device, from the ends of the groups.

Axes: X rows in expert order, E experts, O output width, I input width, P places, B blocks of 128 places, G blocks
of 128 numbers of a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_v3.ops.fp8 import BLOCK, ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.operation import custom_op, fake_of, multiprocessors


class _Tile(NamedTuple):
    """A tile of the result; `stages`: blocks of K in flight; `programs`: how many share a multiprocessor."""

    rows: int
    columns: int  # at most 128, so that a tile lies within one block of a weight
    warps: int
    stages: int
    programs: int


# Of two programs of small tiles, one scales its sums and stores its tile while the other one multiplies. This pays
# if K is short, and for weights, where the scales of both operands vary along the tile.
_LARGE = _Tile(128, 128, warps=8, stages=4, programs=1)
_SMALL = _Tile(64, 128, warps=4, stages=4, programs=2)
_WEIGHTS = _Tile(64, 128, warps=4, stages=3, programs=2)
_SHORT = 1536  # the largest K for small tiles


def rows_product(
    a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The reference's `rows_product`; widths are multiples of 16."""
    return _rows_product(*a, *w, ends_E, dtype)


def columns_product(
    a: ColumnBlocks, b: ColumnBlocks, ends_E: Tensor | None, num_rows: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The reference's `columns_product`; widths are multiples of 16."""
    return _columns_product(*a, *b, ends_E, num_rows, dtype)


@custom_op("fp8_rows_product_triton")
def _rows_product(
    values_XI: Tensor,
    scales_XG: Tensor,
    weight_EOI: Tensor,
    weight_scales: Tensor,
    ends_E: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (num_rows, width), (groups, output, _) = values_XI.shape, weight_EOI.shape
    out_XO = values_XI.new_empty(num_rows, output, dtype=dtype)
    if num_rows:
        tile = _SMALL if width <= _SHORT else _LARGE
        _fp8_rows_product_kernel[(multiprocessors(values_XI.device) * tile.programs,)](
            TensorDescriptor.from_tensor(values_XI, [tile.rows, BLOCK]),
            scales_XG,
            TensorDescriptor.from_tensor(weight_EOI.flatten(0, 1), [tile.columns, BLOCK]),
            weight_scales,
            TensorDescriptor.from_tensor(out_XO, [tile.rows, tile.columns]),
            out_XO,
            ends_E,
            num_rows,
            output,
            width,
            groups,
            GROUPS=triton.next_power_of_2(groups),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out_XO


@custom_op("fp8_columns_product_triton")
def _columns_product(
    a_OP: Tensor,
    a_scales_BO: Tensor,
    b_IP: Tensor,
    b_scales_BI: Tensor,
    ends_E: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    output, width, groups = len(a_OP), len(b_IP), 1 if ends_E is None else len(ends_E)
    if not num_rows:
        return a_OP.new_zeros(groups, output, width, dtype=dtype)
    out_EOI = a_OP.new_empty(groups, output, width, dtype=dtype)
    _fp8_columns_product_kernel[(multiprocessors(a_OP.device) * _WEIGHTS.programs,)](
        TensorDescriptor.from_tensor(a_OP, [_WEIGHTS.rows, BLOCK]),
        a_scales_BO,
        TensorDescriptor.from_tensor(b_IP, [_WEIGHTS.columns, BLOCK]),
        b_scales_BI,
        TensorDescriptor.from_tensor(out_EOI.flatten(0, 1), [_WEIGHTS.rows, _WEIGHTS.columns]),
        out_EOI,
        ends_E,
        num_rows,
        output,
        width,
        groups,
        GROUPS=triton.next_power_of_2(groups),
        ROWS=_WEIGHTS.rows,
        COLUMNS=_WEIGHTS.columns,
        STAGES=_WEIGHTS.stages,
        num_warps=_WEIGHTS.warps,
    )
    return out_EOI


@fake_of(_rows_product)
def _(
    values_XI: Tensor, _0: Tensor, weight_EOI: Tensor, _1: Tensor, _2: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values_XI.new_empty(len(values_XI), weight_EOI.shape[1], dtype=dtype)


@fake_of(_columns_product)
def _(
    a_OP: Tensor, _0: Tensor, b_IP: Tensor, _1: Tensor, ends_E: Tensor | None, _2: int, dtype: torch.dtype
) -> Tensor:
    return a_OP.new_empty(1 if ends_E is None else len(ends_E), len(a_OP), len(b_IP), dtype=dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_rows_product_kernel(
    a,
    a_scales,
    w,
    w_scales,
    whole_tiles,
    out,
    ends,
    num_rows,
    output,
    width,
    groups,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks, column_tiles = tl.cdiv(width, 128), tl.cdiv(output, COLUMNS)
    begins_E, ends_E = _borders(ends, num_rows, groups, GROUPS)
    tile_ends_E = tl.cumsum(tl.cdiv(ends_E - begins_E, ROWS) * column_tiles, 0)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends_E, 0), tl.num_programs(0)):
        passed_E = tile_ends_E <= tile
        group = tl.sum(passed_E.to(tl.int32), 0)
        begin = tl.max(tl.where(passed_E, ends_E, 0), 0)
        end = num_rows if ends is None else tl.load(ends + group)
        first_tile = tl.max(tl.where(passed_E, tile_ends_E, 0), 0)
        row_tile, column_tile = _place(tile - first_tile, tl.cdiv(end - begin, ROWS), column_tiles)
        row, column = begin + row_tile * ROWS, column_tile * COLUMNS

        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        rows = row + tl.arange(0, ROWS)
        a_scale_at = a_scales + rows.to(tl.int64) * blocks
        w_scale_at = w_scales + (group * tl.cdiv(output, 128) + column // 128) * blocks
        for block in tl.range(blocks, num_stages=STAGES):
            scales = tl.load(a_scale_at + block, mask=rows < end, other=0.0) * tl.load(w_scale_at + block)
            product = tl.dot(a.load([row, block * 128]), w.load([group * output + column, block * 128]).T)
            total += product * scales[:, None]
        _store(whole_tiles, out, total, row, column, end, output)


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_columns_product_kernel(
    a,
    a_scales,
    b,
    b_scales,
    whole_tiles,
    out,
    ends,
    num_rows,
    output,
    width,
    groups,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(output, ROWS), tl.cdiv(width, COLUMNS)
    begins_E, ends_E = _borders(ends, num_rows, groups, GROUPS)
    block_ends_E = tl.cumsum(tl.cdiv(ends_E - begins_E, 128), 0)
    for tile in tl.range(tl.program_id(0), groups * row_tiles * column_tiles, tl.num_programs(0)):
        group = tile // (row_tiles * column_tiles)
        row_tile, column_tile = _place(tile % (row_tiles * column_tiles), row_tiles, column_tiles)
        row, column = row_tile * ROWS, column_tile * COLUMNS
        first_block = tl.max(tl.where(tl.arange(0, GROUPS) < group, block_ends_E, 0), 0)
        end_block = tl.max(tl.where(tl.arange(0, GROUPS) <= group, block_ends_E, 0), 0)

        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        for block in tl.range(first_block, end_block, num_stages=STAGES):
            a_scale = tl.load(a_scales + block * output + rows, mask=rows < output, other=0.0)
            b_scale = tl.load(b_scales + block * width + columns, mask=columns < width, other=0.0)
            product = tl.dot(a.load([row, block * 128]), b.load([column, block * 128]).T)
            total += product * a_scale[:, None] * b_scale[None, :]
        first_row = group * output
        _store(whole_tiles, out, total, first_row + row, column, first_row + output, width)


@triton.jit
def _borders(ends, num_rows, groups, GROUPS: tl.constexpr):
    """Begin and end of every group of rows; groups from `groups` on, if any, are empty and begin at 0."""
    group_E = tl.arange(0, GROUPS)
    if ends is None:
        begins_E, ends_E = group_E * 0, group_E * 0 + num_rows
    else:
        begins_E = tl.load(ends + group_E - 1, mask=(group_E > 0) & (group_E < groups), other=0)
        ends_E = tl.load(ends + group_E, mask=group_E < groups, other=0)
    return begins_E, ends_E


@triton.jit
def _place(tile, row_tiles, column_tiles):
    """Row and column of a tile: down eight tiles, then to the right, so that tiles in progress share operands."""
    of_band = 8 * column_tiles
    first = tile // of_band * 8
    height = tl.minimum(row_tiles - first, 8)
    return first + tile % of_band % height, tile % of_band // height


@triton.jit
def _store(whole_tiles, out, total, row, column, end, width):
    """Stores a tile without the rows from `end` on."""
    tile = total.to(out.dtype.element_ty)
    if row + tile.shape[0] <= end:
        whole_tiles.store([row, column], tile)
    else:
        rows, columns = row + tl.arange(0, tile.shape[0]), column + tl.arange(0, tile.shape[1])
        inside = (rows < end)[:, None] & (columns < width)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * width + columns[None, :], tile, mask=inside)

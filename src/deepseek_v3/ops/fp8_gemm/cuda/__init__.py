"""Products of matrices in 8-bit blocks on a Hopper GPU, in CUDA C++; `products.cu` says how the kernel works.

NVRTC compiles the kernel at first use, in about a second for each of its variants, unless it is built already.

Axes: X rows in expert order, E experts, O output width, I input width, P places, B blocks of 128 places, G blocks
of 128 numbers of a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.nvrtc import Kernel, current_device, tensor_map
from deepseek_v3.ops.operation import custom_op, fake_of, multiprocessors

_SOURCE = Path(__file__).with_name("products.cu")
_TILE_ROWS, _THREADS = 128, 384
_SHARED_BYTES = 227 * 2**10  # that a thread block may have on Hopper
# Columns of a tile, and the time of a column of it. The wide tile reads less shared memory for each product.
_TILE_COLUMNS = {256: 1.0, 128: 1.2}


def rows_product(
    a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The reference's `rows_product` in bfloat16 or float32; widths are multiples of 16."""
    return _rows_product(*a, *w, ends_E, dtype)


def columns_product(
    a: ColumnBlocks, b: ColumnBlocks, ends_E: Tensor | None, num_rows: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The reference's `columns_product` in bfloat16 or float32; widths are multiples of 16."""
    return _columns_product(*a, *b, ends_E, num_rows, dtype)


@custom_op("fp8_rows_product_cuda")
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
        row_tiles = -(-num_rows // _TILE_ROWS) + (groups - 1) // 2  # about, for groups of any size
        tile_columns = _tile_columns(row_tiles, output, values_XI.device)
        sizes = _Sizes(groups, num_rows, output, width)
        _launch(tile_columns, values_XI, scales_XG, weight_EOI.flatten(0, 1), weight_scales, ends_E, out_XO, sizes)
    return out_XO


@custom_op("fp8_columns_product_cuda")
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
    row_tiles = -(-output // _TILE_ROWS)
    tile_columns = _tile_columns(groups * row_tiles, width, a_OP.device)
    parts_E = _parts(row_tiles * -(-width // tile_columns), num_rows, a_OP.device) if ends_E is None else None
    if parts_E is not None:
        ends_E, groups, sum_dtype = parts_E, len(parts_E), torch.float32
    else:
        sum_dtype = dtype
    out_EOI = a_OP.new_empty(groups, output, width, dtype=sum_dtype)
    sizes = _Sizes(groups, output, width, num_rows)
    _launch(tile_columns, a_OP, a_scales_BO, b_IP, b_scales_BI, ends_E, out_EOI, sizes, columns=True)
    return out_EOI if parts_E is None else out_EOI.sum(0, keepdim=True).to(dtype)


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


class _Sizes(ctypes.Structure):
    """The kernel's `Sizes`."""

    _fields_ = [(name, ctypes.c_int) for name in ("groups", "rows", "columns", "depth")]


def _launch(
    tile_columns: int,
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    ends_E: Tensor | None,
    out: Tensor,
    sizes: _Sizes,
    columns: bool = False,
) -> None:
    kernel = _kernel(columns, tile_columns, out.dtype == torch.float32)
    with current_device(a.device):
        map_a = tensor_map(a, _TILE_ROWS, BLOCK, swizzle=True)
        map_b = tensor_map(b, tile_columns, BLOCK, swizzle=True)
        map_scales = tensor_map(b_scales, 1, tile_columns) if columns else map_b  # which is not read then
        kernel.launch(
            multiprocessors(a.device), _THREADS, [map_a, map_b, map_scales, a_scales, b_scales, ends_E, out, sizes]
        )


def kernels() -> Iterator[Kernel]:
    """Every variant of the kernel that a product may launch."""
    for columns, tile_columns, float_out in product((False, True), _TILE_COLUMNS, (False, True)):
        yield _kernel(columns, tile_columns, float_out)


@cache
def _kernel(columns: bool, tile_columns: int, float_out: bool) -> Kernel:
    """A variant of the kernel, with as many stages as shared memory can hold; `products.cu` lays it out."""
    scales = 4 * (tile_columns if columns else 0) + 4 * _TILE_ROWS + 128
    stage = (_TILE_ROWS + tile_columns) * BLOCK + scales + 16  # with two barriers
    others = (0 if float_out else 2**14) + 1024  # what the warps store, and the alignment of the tiles
    stages = (_SHARED_BYTES - others) // stage
    defines = {"COLUMNS": int(columns), "TILE_N": tile_columns, "FLOAT_OUT": int(float_out), "STAGES": stages}
    return Kernel(_SOURCE, "fp8_product", defines, stages * stage + others)


@lru_cache(maxsize=1024)
def _tile_columns(row_tiles: int, columns: int, device: torch.device) -> int:
    """The width of tiles with which all multiprocessors together are done first."""

    def seconds(tile: int) -> float:
        turns = -(-row_tiles * -(-columns // tile) // multiprocessors(device))
        return turns * tile * _TILE_COLUMNS[tile]

    return min(_TILE_COLUMNS, key=seconds)


@lru_cache(maxsize=1024)
def _parts(tiles: int, num_rows: int, device: torch.device) -> Tensor | None:
    """The ends of parts of K, summed apart, if one group has too few tiles for all multiprocessors; else None."""
    blocks = -(-num_rows // BLOCK)
    number = min(multiprocessors(device) // tiles, blocks)
    if number < 2:
        return None
    rows = -(-blocks // number) * BLOCK
    ends = torch.arange(1, number + 1, dtype=torch.int32).mul_(rows).clamp_(max=num_rows)
    return ends.to(device)  # which waits for the copy: later calls may be on another stream

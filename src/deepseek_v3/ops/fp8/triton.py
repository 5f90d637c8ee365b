"""Quantizing to FP8 on a GPU: each function reads its input once and writes its result, bit by bit the reference's.

Only SwiGLU and its gradients may differ from the reference's in their last bits, before they are quantized. The
functions are custom operations of torch, which torch.compile calls as they are, and have no gradients.

Axes: those of `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.fp8 import reference
from deepseek_v3.ops.fp8.formats import (
    BLOCK,
    E4M3,
    ColumnBlocks,
    RowBlocks,
    WeightBlocks,
    empty_columns,
    empty_gradients,
    empty_rows,
)
from deepseek_v3.ops.operation import custom_op, fake_of

# Rows and columns that a program takes, where it needs no whole block of them. With these, and with the numbers of
# warps below, everything stays in registers, and an H100 still runs 16 warps on each multiprocessor.
_ROWS, _SWIGLU_ROWS, _COLUMNS = 64, 32, 64
_COPIED_ROWS, _COPIED_BYTES = 4, 4096  # rows and bytes of each that a program copies
_BLOCKS = 16  # blocks of places whose rows a program finds

_N = tl.constexpr(BLOCK)
_LARGEST = tl.constexpr(torch.finfo(E4M3).max)
_SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
_FRACTION = tl.constexpr((1 << 23) - 1)  # the bits of a float32 behind its exponent
_MAGNITUDE = tl.constexpr((1 << 31) - 1)  # the bits of a float32 behind its sign


# The interface


def quantize_rows(x_TD: Tensor, power_of_two: bool) -> RowBlocks:
    return RowBlocks(*_quantize_rows(x_TD, power_of_two))


def quantize_columns(x_TD: Tensor, power_of_two: bool) -> ColumnBlocks:
    return ColumnBlocks(*_quantize_columns(x_TD, power_of_two))


def quantize_both(x_TD: Tensor, power_of_two: bool) -> tuple[RowBlocks, ColumnBlocks]:
    values_TD, scales_TG, values_DP, scales_BD = _quantize_both(x_TD, power_of_two)
    return RowBlocks(values_TD, scales_TG), ColumnBlocks(values_DP, scales_BD)


def gather_rows(rows: RowBlocks, source_X: Tensor) -> RowBlocks:
    return RowBlocks(*_gather_rows(*rows, source_X))


def gather_columns(x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool) -> ColumnBlocks:
    return ColumnBlocks(*_gather_columns(x_RD, source_X, ends_E, power_of_two))


def requantize_columns(
    rows: RowBlocks, source_X: Tensor, ends_E: Tensor, power_of_two: bool, dtype: torch.dtype
) -> ColumnBlocks:
    return ColumnBlocks(*_requantize_columns(*rows, source_X, ends_E, power_of_two, dtype))


def quantize_weight(w_EOI: Tensor, power_of_two: bool) -> tuple[WeightBlocks, WeightBlocks]:
    values_EOI, scales, transposed_EIO, transposed_scales = _quantize_weight(w_EOI, power_of_two)
    return WeightBlocks(values_EOI, scales), WeightBlocks(transposed_EIO, transposed_scales)


def swiglu(gate_up_XG2: Tensor, gates_X: Tensor | None, power_of_two: bool) -> tuple[RowBlocks, RowBlocks]:
    """In one pass if F is a multiple of 128, so that no block of the kept input holds numbers of gate and up."""
    values_XF, scales, kept_XG2, kept_scales = _swiglu(gate_up_XG2, gates_X, power_of_two)
    return RowBlocks(values_XF, scales), RowBlocks(kept_XG2, kept_scales)


def swiglu_backward(
    kept: RowBlocks, grad_hidden_XF: Tensor, gates_X: Tensor | None, ends_E: Tensor | None, power_of_two: bool
) -> tuple[RowBlocks, ColumnBlocks, ColumnBlocks, Tensor | None]:
    """In one pass if F is a multiple of 128, as in `swiglu`."""
    found = _swiglu_backward(*kept, grad_hidden_XF, gates_X, ends_E, power_of_two)
    grad_gates_X = None if gates_X is None else found[6]
    return RowBlocks(*found[:2]), ColumnBlocks(*found[2:4]), ColumnBlocks(*found[4:6]), grad_gates_X


# The custom operations


@custom_op("fp8_quantize_rows")
def _quantize_rows(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    values_TD, scales_TG = empty_rows(x_TD, *x_TD.shape)
    if x_TD.numel():
        x_TD = _with_unit_stride(x_TD)
        (rows, width), blocks = x_TD.shape, scales_TG.shape[1]
        _fp8_rows_kernel[(triton.cdiv(rows, _ROWS) * blocks,)](
            x_TD, x_TD.stride(0), rows, width, blocks, values_TD, scales_TG, power_of_two, _ROWS, num_warps=4
        )
    return values_TD, scales_TG


@fake_of(_quantize_rows)
def _(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001 -- the operation's signature
    return empty_rows(x_TD, *x_TD.shape)


@custom_op("fp8_quantize_columns")
def _quantize_columns(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    columns = empty_columns(x_TD, *x_TD.shape)
    _run_columns_kernel(x_TD, columns, len(x_TD), power_of_two)
    return columns


@fake_of(_quantize_columns)
def empty_for_columns(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001 -- the operation's signature
    return empty_columns(x_TD, *x_TD.shape)


@custom_op("fp8_quantize_both")
def _quantize_both(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = empty_rows(x_TD, *x_TD.shape), empty_columns(x_TD, *x_TD.shape)
    _run_columns_kernel(x_TD, columns, len(x_TD), power_of_two, row_copy=rows)
    return *rows, *columns


@fake_of(_quantize_both)
def empty_for_both(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ARG001 -- see above
    return *empty_rows(x_TD, *x_TD.shape), *empty_columns(x_TD, *x_TD.shape)


@custom_op("fp8_gather_rows")
def _gather_rows(values_RD: Tensor, scales_RG: Tensor, source_X: Tensor) -> tuple[Tensor, Tensor]:
    values_XD, scales_XG = empty_rows(values_RD, len(source_X), values_RD.shape[1])
    if values_XD.numel():
        rows, width = values_XD.shape
        chunks = triton.cdiv(width, _COPIED_BYTES)
        _fp8_copy_kernel[(triton.cdiv(rows, _COPIED_ROWS) * chunks,)](
            values_RD.view(torch.uint8),
            scales_RG,
            source_X.contiguous(),
            rows,
            width,
            chunks,
            values_XD.view(torch.uint8),
            scales_XG,
            _COPIED_ROWS,
            _COPIED_BYTES,
        )
    return values_XD, scales_XG


@fake_of(_gather_rows)
def _(values_RD: Tensor, scales_RG: Tensor, source_X: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001 -- see above
    return empty_rows(values_RD, source_X.shape[0], values_RD.shape[1])


@custom_op("fp8_gather_columns")
def _gather_columns(x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    columns = empty_columns(x_RD, len(source_X), x_RD.shape[1], len(ends_E))
    _run_columns_kernel(x_RD, columns, len(source_X), power_of_two, source_X, ends_E)
    return columns


@fake_of(_gather_columns)
def empty_for_gathered(
    x_RD: Tensor,
    source_X: Tensor,
    ends_E: Tensor,
    power_of_two: bool,  # noqa: ARG001 -- see above
) -> tuple[Tensor, Tensor]:
    return empty_columns(x_RD, source_X.shape[0], x_RD.shape[1], ends_E.shape[0])


@custom_op("fp8_requantize_columns")
def _requantize_columns(
    values_RD: Tensor,
    scales_RG: Tensor,
    source_X: Tensor,
    ends_E: Tensor,
    power_of_two: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    columns = empty_columns(values_RD, len(source_X), values_RD.shape[1], len(ends_E))
    _run_columns_kernel(
        values_RD, columns, len(source_X), power_of_two, source_X, ends_E, scales_RG=scales_RG, dtype=dtype
    )
    return columns


@fake_of(_requantize_columns)
def _(
    values_RD: Tensor,
    scales_RG: Tensor,  # noqa: ARG001 -- the operation's signature
    source_X: Tensor,
    ends_E: Tensor,
    power_of_two: bool,  # noqa: ARG001
    dtype: torch.dtype,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return empty_columns(values_RD, source_X.shape[0], values_RD.shape[1], ends_E.shape[0])


@custom_op("fp8_quantize_weight")
def _quantize_weight(w_EOI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _empty_weights(w_EOI)
    if w_EOI.numel():
        w_EOI = _with_unit_stride(w_EOI)
        (experts, out, width), (_, out_blocks, blocks) = w_EOI.shape, found[1].shape
        _fp8_weight_kernel[(experts * out_blocks * blocks,)](
            w_EOI, w_EOI.stride(0), w_EOI.stride(1), out, width, *found, power_of_two, num_warps=8
        )
    return found


@fake_of(_quantize_weight)
def _(w_EOI: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ARG001 -- see above
    return _empty_weights(w_EOI)


@custom_op("fp8_swiglu")
def _swiglu(
    gate_up_XG2: Tensor, gates_X: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up_XG2.shape[0], gate_up_XG2.shape[1] // 2
    if width % BLOCK:
        hidden_XF = reference.swiglu_hidden(gate_up_XG2, gates_X)
        return *_quantize_rows(hidden_XF, power_of_two), *_quantize_rows(gate_up_XG2, power_of_two)
    found = *empty_rows(gate_up_XG2, rows, width), *empty_rows(gate_up_XG2, rows, 2 * width)
    if gate_up_XG2.numel():
        gate_up_XG2 = _with_unit_stride(gate_up_XG2)
        _fp8_swiglu_kernel[(triton.cdiv(rows, _SWIGLU_ROWS) * (width // BLOCK),)](
            gate_up_XG2,
            gate_up_XG2.stride(0),
            gates_X,
            rows,
            width,
            *found,
            power_of_two,
            _SWIGLU_ROWS,
            num_warps=4,
        )
    return found


@fake_of(_swiglu)
def _(
    gate_up_XG2: Tensor,
    gates_X: Tensor | None,  # noqa: ARG001 -- the operation's signature
    power_of_two: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up_XG2.shape
    return *empty_rows(gate_up_XG2, rows, width // 2), *empty_rows(gate_up_XG2, rows, width)


@custom_op("fp8_swiglu_backward")
def _swiglu_backward(
    kept_XG2: Tensor,
    kept_scales: Tensor,
    grad_hidden_XF: Tensor,
    gates_X: Tensor | None,
    ends_E: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, width), groups = grad_hidden_XF.shape, 1 if ends_E is None else len(ends_E)
    if width % BLOCK:
        grad_XG2, hidden_XF, grad_gates_X = reference.swiglu_gradients(
            RowBlocks(kept_XG2, kept_scales), grad_hidden_XF, gates_X
        )
        grad_columns = empty_columns(grad_XG2, rows, 2 * width, groups)
        hidden_columns = empty_columns(hidden_XF, rows, width, groups)
        _run_columns_kernel(grad_XG2, grad_columns, rows, power_of_two, ends_E=ends_E)
        _run_columns_kernel(hidden_XF, hidden_columns, rows, power_of_two, ends_E=ends_E)
        grad_gates = grad_XG2.new_empty(0) if grad_gates_X is None else grad_gates_X
        return *_quantize_rows(grad_XG2, power_of_two), *grad_columns, *hidden_columns, grad_gates
    grad_rows, grad_columns, hidden_columns, grad_gates = empty_gradients(grad_hidden_XF, gates_X, groups)
    if grad_hidden_XF.numel():
        grad_hidden_XF = _with_unit_stride(grad_hidden_XF)
        blocks, places = width // BLOCK, hidden_columns[0].shape[1]
        # Each program sums the gradient of gates_X over its own features: atomic additions have no fixed order.
        sums = grad_hidden_XF.new_empty(rows if gates_X is not None else 0, blocks, dtype=torch.float32)
        _fp8_swiglu_backward_kernel[(places // BLOCK * blocks * 3,)](
            kept_XG2,
            kept_scales,
            grad_hidden_XF,
            grad_hidden_XF.stride(0),
            gates_X,
            None if ends_E is None else find_rows_of_blocks(ends_E, places // BLOCK),
            rows,
            width,
            places,
            *grad_rows,
            *grad_columns,
            *hidden_columns,
            sums,
            power_of_two,
            num_warps=16,
        )
        if gates_X is not None:
            grad_gates = sums.sum(1)
    return *grad_rows, *grad_columns, *hidden_columns, grad_gates


@fake_of(_swiglu_backward)
def empty_for_gradients(
    kept_XG2: Tensor,  # noqa: ARG001 -- the operation's signature
    kept_scales: Tensor,  # noqa: ARG001
    grad_hidden_XF: Tensor,
    gates_X: Tensor | None,
    ends_E: Tensor | None,
    power_of_two: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = empty_gradients(grad_hidden_XF, gates_X, 1 if ends_E is None else ends_E.shape[0])
    return *found[0], *found[1], *found[2], found[3]


# Memory for the results


def _empty_weights(w_EOI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values and scales of the weights, and of their transposes."""
    experts, out, width = w_EOI.shape
    blocks = -(-out // BLOCK), -(-width // BLOCK)
    return (
        w_EOI.new_empty(experts, out, width, dtype=E4M3),
        w_EOI.new_empty(experts, *blocks, dtype=torch.float32),
        w_EOI.new_empty(experts, width, out, dtype=E4M3),
        w_EOI.new_empty(experts, *reversed(blocks), dtype=torch.float32),
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# Launching


def _run_columns_kernel(
    x_RD: Tensor,
    columns: tuple[Tensor, Tensor],
    rows: int,
    power_of_two: bool,
    source_X: Tensor | None = None,
    ends_E: Tensor | None = None,
    *,
    row_copy: tuple[Tensor, Tensor] | None = None,
    scales_RG: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fills `columns`, and `row_copy` of the same rows if it is given.

    Without `source_X` the rows are those of `x_RD` in their order, without `ends_E` they are one group. If `x_RD`
    is in e4m3 with the scales `scales_RG`, its numbers are rounded to `dtype`.
    """
    values_DP, scales_BD = columns
    width, places = values_DP.shape
    if not rows or not width:
        return
    x_RD = _with_unit_stride(x_RD)
    columns_of_tile, warps, registers = (_COLUMNS, 4, None) if row_copy is None else (BLOCK, 8, 128)
    _fp8_columns_kernel[(places // BLOCK * triton.cdiv(width, columns_of_tile),)](
        x_RD,
        x_RD.stride(0),
        scales_RG,
        None if source_X is None else source_X.contiguous(),
        None if ends_E is None else find_rows_of_blocks(ends_E, places // BLOCK),
        rows,
        width,
        places,
        values_DP,
        scales_BD,
        *(row_copy or (None, None)),
        power_of_two,
        _TYPES[dtype],
        columns_of_tile,
        num_warps=warps,
        maxnreg=registers,
    )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def find_rows_of_blocks(ends_E: Tensor, blocks: int) -> Tensor:
    """The first row of each block of places and the end of its group, (B, 2) int32; 0 behind the last group."""
    rows_B2 = torch.empty(blocks, 2, dtype=torch.int32, device=ends_E.device)
    groups = len(ends_E)
    _fp8_rows_of_blocks_kernel[(triton.cdiv(blocks, _BLOCKS),)](
        ends_E.contiguous(), groups, blocks, rows_B2, triton.next_power_of_2(groups), _BLOCKS
    )
    return rows_B2


# The kernels


@triton.jit
def _largest(x, axis: tl.constexpr):
    """The largest magnitude along an axis, NaN if there is one: as whole numbers, magnitudes lie below NaN."""
    magnitudes = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    return tl.max(magnitudes, axis).to(tl.float32, bitcast=True)


@triton.jit
def _scale_of(largest, power_of_two: tl.constexpr):
    scale = tl.math.div_rn(largest, _LARGEST)
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # leaves NaN as it is
    if power_of_two:
        rounded_up = (scale.to(tl.int32, bitcast=True) + _FRACTION) & ~_FRACTION
        scale = tl.where(scale == scale, rounded_up.to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def _quantized(x, scale):
    return (x * tl.math.div_rn(1.0, scale)).to(tl.float8e4nv)


@triton.jit
def _store_rows(x, row, column, rows, width, values, scales, power_of_two: tl.constexpr):
    """Quantizes a tile that is one block wide by rows, and stores values (rows, width) and their scales."""
    inside = row < rows
    scale = _scale_of(_largest(x, 1), power_of_two)
    blocks = tl.cdiv(width, _N)
    tl.store(scales + row.to(tl.int64) * blocks + column // _N, scale, mask=inside)
    at = row.to(tl.int64)[:, None] * width + (column + tl.arange(0, _N))[None, :]
    mask = inside[:, None] & (column + tl.arange(0, _N) < width)[None, :]
    tl.store(values + at, _quantized(x, scale[:, None]), mask=mask)


@triton.jit
def _store_columns(x, block, columns, width, places, values, scales, power_of_two: tl.constexpr):
    """Quantizes a tile of one block of places by columns, and stores values (width, places) and their scales."""
    scale = _scale_of(_largest(x, 0), power_of_two)
    tl.store(scales + block.to(tl.int64) * width + columns, scale, mask=columns < width)
    at = columns.to(tl.int64)[:, None] * places + (block * _N + tl.arange(0, _N))[None, :]
    quantized = tl.trans(_quantized(x, scale[None, :]))
    tl.store(values + at, quantized, mask=(columns < width)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _fp8_rows_kernel(
    x, stride, rows, width, blocks, values, scales, power_of_two: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.program_id(0) % blocks * _N
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = column + tl.arange(0, _N)
    inside = (row < rows)[:, None] & (columns < width)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    _store_rows(tile.to(tl.float32), row, column, rows, width, values, scales, power_of_two)


@triton.jit(do_not_specialize=["rows"])
def _fp8_copy_kernel(
    values,
    scales,
    source,
    rows,
    width,
    chunks,
    values_out,
    scales_out,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    from_row = tl.load(source + row, mask=inside, other=0).to(tl.int64)

    column = chunk * BYTES + tl.arange(0, BYTES)
    mask = inside[:, None] & (column < width)[None, :]
    copied = tl.load(values + from_row[:, None] * width + column[None, :], mask=mask)
    tl.store(values_out + row[:, None] * width + column[None, :], copied, mask=mask)

    blocks = tl.cdiv(width, _N)
    block = chunk * (BYTES // _N) + tl.arange(0, BYTES // _N)
    mask = inside[:, None] & (block < blocks)[None, :]
    scale = tl.load(scales + from_row[:, None] * blocks + block[None, :], mask=mask)
    tl.store(scales_out + row[:, None] * blocks + block[None, :], scale, mask=mask)


@triton.jit(do_not_specialize=["groups", "blocks"])
def _fp8_rows_of_blocks_kernel(ends, groups, blocks, out, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, mask=group < groups, other=0)
    begin = tl.load(ends + group - 1, mask=(group > 0) & (group < groups), other=0)
    blocks_of_group = tl.cdiv(end - begin, _N)
    last_block = tl.cumsum(blocks_of_group, 0)
    first_block = last_block - blocks_of_group

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    own = (block[:, None] >= first_block[None, :]) & (block[:, None] < last_block[None, :])
    first = begin[None, :] + (block[:, None] - first_block[None, :]) * _N
    tl.store(out + 2 * block, tl.sum(tl.where(own, first, 0), 1), mask=block < blocks)
    tl.store(out + 2 * block + 1, tl.sum(tl.where(own, end[None, :], 0), 1), mask=block < blocks)


@triton.jit
def _rows_of_block(block, rows_of_blocks, rows):
    """The rows at the places of this block, and the end of the rows of its group."""
    if rows_of_blocks is None:
        first, last = block * _N, rows
    else:
        first, last = tl.load(rows_of_blocks + 2 * block), tl.load(rows_of_blocks + 2 * block + 1)
    return first + tl.arange(0, _N), last


@triton.jit(do_not_specialize=["rows"])
def _fp8_columns_kernel(
    x,
    stride,
    x_scales,
    source,
    rows_of_blocks,
    rows,
    width,
    places,
    values,
    scales,
    row_values,
    row_scales,
    power_of_two: tl.constexpr,
    dtype: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    block, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles * COLUMNS
    row, last = _rows_of_block(block, rows_of_blocks, rows)
    if last == 0:  # behind the last group
        return
    from_row = row.to(tl.int64)
    if source is not None:
        from_row = tl.load(source + row, mask=row < last, other=0).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS)
    inside = (row < last)[:, None] & (columns < width)[None, :]
    tile_at = x + from_row[:, None] * stride + columns[None, :]
    tile = tl.load(tile_at, mask=inside, other=0.0).to(tl.float32)
    if x_scales is not None:
        scale = tl.load(x_scales + from_row * tl.cdiv(width, _N) + column // _N, mask=row < last, other=0.0)
        tile = (tile * scale[:, None]).to(dtype).to(tl.float32)
    _store_columns(tile, block, columns, width, places, values, scales, power_of_two)
    if row_values is not None:
        tile = tl.load(tile_at, mask=inside, other=0.0).to(tl.float32)  # from the cache: registers are scarcer
        _store_rows(tile, row, column, last, width, row_values, row_scales, power_of_two)


@triton.jit
def _fp8_weight_kernel(
    w,
    expert_stride,
    row_stride,
    out,
    width,
    values,
    scales,
    transposed,
    transposed_scales,
    power_of_two: tl.constexpr,
):
    row_blocks, blocks = tl.cdiv(out, _N), tl.cdiv(width, _N)
    square, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert, row_block = (square // row_blocks).to(tl.int64), square % row_blocks
    row, column = row_block * _N + tl.arange(0, _N), block * _N + tl.arange(0, _N)
    inside = (row < out)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    tile = tl.load(w + expert * expert_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = _scale_of(_largest(tl.reshape(tile, (_N * _N,)), 0), power_of_two)
    tl.store(scales + (expert * row_blocks + row_block) * blocks + block, scale)
    tl.store(transposed_scales + (expert * blocks + block) * row_blocks + row_block, scale)
    begin = expert * out * width
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(values + begin + at, _quantized(tile, scale), mask=inside)
    # Read again in the other order, from the cache: on Hopper, Triton 3.6 transposes such tiles of float32 wrongly.
    inside = (column < width)[:, None] & (row < out)[None, :]
    at = row.to(tl.int64)[None, :] * row_stride + column[:, None]
    tile = tl.load(w + expert * expert_stride + at, mask=inside, other=0.0).to(tl.float32)
    at = column.to(tl.int64)[:, None] * out + row[None, :]
    tl.store(transposed + begin + at, _quantized(tile, scale), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _fp8_swiglu_kernel(
    gate_up,
    stride,
    gates,
    rows,
    width,
    values,
    scales,
    kept,
    kept_scales,
    power_of_two: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = width // _N
    column = tl.program_id(0) % blocks * _N
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = row.to(tl.int64)[:, None] * stride + (column + tl.arange(0, _N))[None, :]
    gate = tl.load(gate_up + at, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside[:, None], other=0.0).to(tl.float32)
    _store_rows(gate, row, column, rows, 2 * width, kept, kept_scales, power_of_two)
    _store_rows(up, row, column + width, rows, 2 * width, kept, kept_scales, power_of_two)
    hidden = gate * tl.sigmoid(gate) * up
    if gates is not None:
        hidden *= tl.load(gates + row, mask=inside, other=0.0)[:, None]
    _store_rows(hidden, row, column, rows, width, values, scales, power_of_two)


@triton.jit(do_not_specialize=["rows"])
def _fp8_swiglu_backward_kernel(
    kept,
    kept_scales,
    grad_hidden,
    stride,
    gates,
    rows_of_blocks,
    rows,
    width,
    places,
    row_values,
    row_scales,
    values,
    scales,
    hidden_values,
    hidden_scales,
    sums,
    power_of_two: tl.constexpr,
):
    # One result per program, for the sake of registers; the input comes from the cache after the first one.
    blocks = width // _N
    tile, result = tl.program_id(0) // 3, tl.program_id(0) % 3
    block, column = tile // blocks, tile % blocks * _N
    row, last = _rows_of_block(block, rows_of_blocks, rows)
    if last == 0:  # behind the last group
        return
    inside = row < last
    columns = column + tl.arange(0, _N)
    kept_at = kept + row.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    scale_at = kept_scales + row.to(tl.int64) * (2 * blocks) + column // _N
    grad_at = grad_hidden + row.to(tl.int64)[:, None] * stride + columns[None, :]
    gate = tl.load(kept_at, mask=inside[:, None], other=0.0).to(tl.float32)
    gate *= tl.load(scale_at, mask=inside, other=0.0)[:, None]
    sigmoid = tl.sigmoid(gate)
    factor = gate * sigmoid
    if result == 2:
        factor = sigmoid * (1 + gate * (1 - sigmoid))
    if result != 1:
        up = tl.load(kept_at + width, mask=inside[:, None], other=0.0).to(tl.float32)
        factor *= up * tl.load(scale_at + blocks, mask=inside, other=0.0)[:, None]
    gates_of_rows = 1.0
    if gates is not None:
        gates_of_rows = tl.load(gates + row, mask=inside, other=0.0)[:, None]
    if result == 0:
        if gates is not None:
            grad = tl.load(grad_at, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(sums + row.to(tl.int64) * blocks + column // _N, tl.sum(grad * factor, 1), mask=inside)
        hidden = factor * gates_of_rows
        _store_columns(hidden, block, columns, width, places, hidden_values, hidden_scales, power_of_two)
    else:
        grad = tl.load(grad_at, mask=inside[:, None], other=0.0).to(tl.float32) * gates_of_rows
        grad *= factor
        half = (2 - result) * width
        _store_columns(grad, block, columns + half, 2 * width, places, values, scales, power_of_two)
        _store_rows(grad, row, column + half, last, 2 * width, row_values, row_scales, power_of_two)

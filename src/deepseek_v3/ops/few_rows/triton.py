"""The operations of a step of generation in Triton.

One kernel computes all products: a program multiplies a tile of rows by a tile of a weight's columns, over all of
their length. The sums of a row follow the same order in every tile, so its numbers have the same bits whatever the
other rows are.

Axes: as in `reference.py`; P programs of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.early_launch.triton import early, wait
from deepseek_v3.ops.expert_choice import ChosenRows

_ENOUGH_TILES = 64  # of 64 columns; with fewer of them, smaller tiles read faster
_LOGITS = 2048  # of a program
_NOT_FINITE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class _Tile(NamedTuple):
    """Rows by columns of a tile, the numbers of 16 bits of both that are multiplied at a time, and its warps."""

    rows: int
    columns: int
    length: int
    warps: int


def product(x_MI: Tensor, w_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The reference's `product`; sums of bfloat16 numbers are those of the tensor cores, in float32."""
    out_MO = x_MI.new_empty(len(x_MI), len(w_OI), dtype=dtype)
    _multiply(x_MI[None], w_OI[None], out_MO[None])
    return out_MO


def swiglu_product(x_MI: Tensor, w_GI: Tensor) -> Tensor:
    """The reference's `swiglu_product`."""
    out_MF = x_MI.new_empty(len(x_MI), len(w_GI) // 2)
    _multiply(x_MI[None], w_GI[None], out_MF[None], swiglu=True)
    return out_MF


def product_by_head(x_MHI: Tensor, w_HOI: Tensor, out_MHO: Tensor) -> None:
    """The reference's `product_by_head`."""
    _multiply(x_MHI.transpose(0, 1), w_HOI, out_MHO.transpose(0, 1))


def rotate_heads(x_MHR: Tensor, cos_MP: Tensor, sin_MP: Tensor, out_MHR: Tensor) -> None:
    """The reference's `rotate_heads`; the last axes of its tensors are dense."""
    rows, heads, rope = x_MHR.shape
    _rotate_kernel[(rows,)](
        x_MHR,
        cos_MP.contiguous(),
        sin_MP.contiguous(),
        out_MHR,
        heads,
        *x_MHR.stride()[:2],
        *out_MHR.stride()[:2],
        HEADS=triton.next_power_of_2(heads),
        PAIRS=rope // 2,
        PAIR_BLOCK=triton.next_power_of_2(rope // 2),
        num_warps=8 if heads > 32 else 4,
        **early(x_MHR.device),
    )


def add_norm(x_MD: Tensor, added_MKD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference's `add_norm`, in one kernel."""
    sum_MD, normed_MD = torch.empty_like(x_MD), torch.empty_like(x_MD)
    _add_norm(x_MD, added_MKD, norm_D, eps, sum_MD, normed_MD)
    return sum_MD, normed_MD


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of `ops.rms_norm`; the last axis of `x` is dense."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _add_norm(x.reshape(-1, x.shape[-1]), None, weight_D, eps, None, normed)
    return normed


def _add_norm(
    x_MD: Tensor, added_MKD: Tensor | None, norm_D: Tensor, eps: float, sum_MD: Tensor | None, normed_MD: Tensor
) -> None:
    rows, width = x_MD.shape
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x_MD,
        added_MKD,
        norm_D,
        sum_MD,
        normed_MD,
        x_MD.stride(0),
        width,
        eps,
        ADDED=0 if added_MKD is None else added_MKD.shape[1],
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
        **early(x_MD.device),
    )


def expert_swiglu_product(x_MD: Tensor, w_EGD: Tensor, rows: ChosenRows, gates_MK: Tensor) -> Tensor:
    """The reference's `expert_swiglu_product`."""
    out_MKF = x_MD.new_empty(*gates_MK.shape, w_EGD.shape[1] // 2)
    _multiply(x_MD[None], w_EGD, out_MKF.flatten(0, 1)[None], rows, gates_MK, swiglu=True)
    return out_MKF


def expert_product(hidden_MKF: Tensor, w_EDF: Tensor, rows: ChosenRows) -> Tensor:
    """The reference's `expert_product`."""
    out_MKD = hidden_MKF.new_empty(*hidden_MKF.shape[:2], w_EDF.shape[1])
    _multiply(hidden_MKF.flatten(0, 1)[None], w_EDF, out_MKD.flatten(0, 1)[None], rows)
    return out_MKD


def greedy_choice(logits_BV: Tensor) -> Tensor:
    """The reference's `greedy_choice`, for logits whose last axis is dense.

    Many programs read a row, and one takes the best of theirs. A logit and its id are one whole number of 64 bits,
    in whose upper half the bits of the logit are ordered like it.
    """
    rows, vocabulary = logits_BV.shape
    programs = triton.cdiv(vocabulary, _LOGITS)
    best_BP = torch.empty(rows, programs, dtype=torch.int64, device=logits_BV.device)
    tokens_B = best_BP.new_empty(rows)
    if rows:
        _best_kernel[(rows, programs)](logits_BV, best_BP, vocabulary, logits_BV.stride(0), BLOCK=_LOGITS)
        _token_kernel[(rows,)](best_BP, tokens_B, programs, BLOCK=triton.next_power_of_2(programs))
    return tokens_B


def _multiply(
    x_HMI: Tensor,
    w_HOI: Tensor,
    out_HMO: Tensor,
    chosen: ChosenRows | None = None,
    gates_MK: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """Writes the products of groups, heads or experts, to `out_HMO`; the last axis of `x_HMI` is dense.

    Without `chosen` each group has rows of its own. With it, all share the rows, and a group multiplies those that
    chose it: with gates every row of x has K choices, otherwise one.
    """
    groups, columns, length = len(w_HOI), out_HMO.shape[2], x_HMI.shape[2]
    rows = x_HMI.shape[1] if chosen is None else chosen.choices_EM.shape[1]
    per_row = 0 if chosen is None else 1 if gates_MK is None else gates_MK.shape[1]
    of_group = rows if chosen is None else triton.cdiv(out_HMO.shape[1], groups)
    tile = _tile(of_group, columns, groups, is_chosen=chosen is not None)
    grid = triton.cdiv(columns, tile.columns), groups, triton.cdiv(rows, tile.rows)
    _product_kernel[grid](
        x_HMI,
        w_HOI,
        out_HMO,
        None if chosen is None else chosen.choices_EM,
        None if chosen is None else chosen.counts_E,
        gates_MK,
        rows,
        columns,
        length,
        *x_HMI.stride()[:2],
        *w_HOI.stride(),
        *out_HMO.stride(),
        PER_ROW=per_row,
        SWIGLU=swiglu,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        LENGTH=min(tile.length * 2 // x_HMI.element_size(), max(16, triton.next_power_of_2(length))),
        num_warps=tile.warps,
        num_stages=4,
        **early(x_HMI.device),
    )


def _tile(rows: int, columns: int, groups: int, is_chosen: bool) -> _Tile:
    """The tile for some rows of a group, on average. All tiles give a row the same bits.

    Few tiles are too few to read with the whole GPU; more of them than choices are programs that find no row.
    """
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = groups * (columns // 64) * triton.cdiv(rows, height)
    if is_chosen or tiles >= _ENOUGH_TILES:
        return _Tile(height, 64, 128, 4)
    return _Tile(height, 32, 128, 4) if height == 64 else _Tile(16, 16, 256, 2)


# The kernels


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x,
    w,
    out,
    choices,
    counts,
    gates,
    rows,
    columns,
    length,
    x_group,
    x_row,
    w_group,
    w_column,
    w_at_length,
    out_group,
    out_row,
    out_column,
    PER_ROW: tl.constexpr,
    SWIGLU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    group = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if PER_ROW == 0:
        here = place < rows
        target = place.to(tl.int64)
        x_at = x + group * x_group + target * x_row
        out_at = out + group * out_group + target * out_row
    else:
        number = tl.load(counts + group)
        if tl.program_id(2) * ROWS >= number:
            return
        here = place < number
        target = tl.load(choices + group * rows + place, mask=here, other=0).to(tl.int64)
        x_at = x + target // PER_ROW * x_row
        out_at = out + target * out_row
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w_at = w + group * w_group + column.to(tl.int64) * w_column
    inside = (column < columns)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, LENGTH):
        at = start + tl.arange(0, LENGTH)
        x_tile = tl.load(x_at[:, None] + at[None, :], mask=here[:, None] & (at < length)[None, :], other=0.0)
        w_mask = inside & (at < length)[:, None]
        w_tile_at = w_at[None, :] + at[:, None] * w_at_length
        w_tile = tl.load(w_tile_at, mask=w_mask, other=0.0)
        sums = tl.dot(x_tile, w_tile, sums, input_precision="ieee")
        if SWIGLU:
            up_tile = tl.load(w_tile_at + columns.to(tl.int64) * w_column, mask=w_mask, other=0.0)
            ups = tl.dot(x_tile, up_tile, ups, input_precision="ieee")
    if SWIGLU:
        sums = sums / (1.0 + tl.exp(-sums)) * ups
        if gates is not None:
            sums *= tl.load(gates + target, mask=here, other=0.0)[:, None]
    out_tile = out_at[:, None] + column[None, :] * out_column
    tl.store(out_tile, sums.to(out.dtype.element_ty), mask=here[:, None] & inside)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    heads,
    x_row,
    x_head,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIR_BLOCK)[None, :]
    mask = (head < heads) & (pair < PAIRS)
    x_at = x + row * x_row + head * x_head + 2 * pair
    even = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x_at + 1, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + row * PAIRS + pair, mask=pair < PAIRS, other=0.0)
    s = tl.load(sin + row * PAIRS + pair, mask=pair < PAIRS, other=0.0)
    out_at = out + row * out_row + head * out_head + 2 * pair
    tl.store(out_at, (even * c - odd * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out_at + 1, (even * s + odd * c).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_kernel(
    x,
    added,
    norm,
    sum_out,
    normed_out,
    x_row,
    width,
    eps,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    kind = normed_out.dtype.element_ty
    if ADDED > 0:
        sums = tl.zeros((BLOCK,), tl.float32)
        for place in tl.static_range(ADDED):
            sums += tl.load(added + (row * ADDED + place) * width + column, mask=mask, other=0.0).to(tl.float32)
        total += sums.to(kind).to(tl.float32)
    total = total.to(kind)
    if sum_out is not None:
        tl.store(sum_out + row * width + column, total, mask=mask)
    wide = total.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    weight = tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_out + row * width + column, (wide * scale * weight).to(kind), mask=mask)


@triton.jit
def _best_kernel(logits, best_out, vocabulary, logits_row, BLOCK: tl.constexpr):
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = program * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    logit = tl.load(logits + row * logits_row + token, mask=inside, other=0.0).to(tl.float32)
    difference = logit - logit  # 0 if it is finite
    logit = tl.where(logit == 0, 0.0, logit)  # -0 equals 0
    bits = logit.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) + (0x7FFFFFFF - token)
    key = tl.where(inside, key, -0x7FFFFFFFFFFFFFFF)
    key = tl.where(difference == 0, key, _NOT_FINITE)
    tl.store(best_out + row * tl.num_programs(1) + program, tl.max(key, 0))


@triton.jit
def _token_kernel(best, tokens_out, programs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    program = tl.arange(0, BLOCK)
    key = tl.load(best + row * programs + program, mask=program < programs, other=-0x7FFFFFFFFFFFFFFF)
    largest = tl.max(key, 0)
    token = 0x7FFFFFFF - (largest & 0xFFFFFFFF)
    tl.store(tokens_out + row, tl.where(largest == _NOT_FINITE, -1, token))

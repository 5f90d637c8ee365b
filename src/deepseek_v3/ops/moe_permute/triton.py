"""Moving token rows on a GPU with as few kernels as possible.

`gather_rows` reads every row once and writes it to all of its places, instead of reading it again for each copy.
`sum_rows` reads every row once and writes every sum once, without a table of all copies in between.
`sort_into_bins` runs two kernels: the first counts the choices by bin and block of tokens, the second places them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.moe_permute import reference
from deepseek_v3.ops.moe_permute.reference import BinOrder, ExpertBins, RowCopies
from deepseek_v3.ops.operation import custom_op, fake_of

_MOST_COLUMNS = 1024  # columns of a row that one program copies or sums
_NUMBERS = 2048  # numbers that one program copies
_CHOICES = 2048  # choices that one program counts or places
_COUNTS = 4096  # counts that a program loads at a time to sum them


def gather_rows(x_TD: Tensor, copies: RowCopies) -> Tensor:
    """The reference's `gather_rows`."""
    return torch.ops.deepseek_v3.gather_rows(x_TD, copies.slots_TM, copies.source_X.shape[0])


@custom_op("gather_rows")
def _gather_rows(x_TD: Tensor, slots_TM: Tensor, number: int) -> Tensor:
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (tokens, width), out_XD = x_TD.shape, _empty_copies(x_TD, slots_TM, number)
    if out_XD.numel():
        columns = min(_MOST_COLUMNS, triton.next_power_of_2(width))
        rows = _NUMBERS // columns
        grid = (triton.cdiv(tokens, rows), triton.cdiv(width, columns))
        _gather_rows_kernel[grid](
            x_TD,
            slots_TM.contiguous(),
            out_XD,
            tokens,
            number,
            width,
            x_TD.stride(0),
            MOST=slots_TM.shape[1],
            ROWS=rows,
            COLUMNS=columns,
        )
    return out_XD


@fake_of(_gather_rows)
def _empty_copies(x_TD: Tensor, slots_TM: Tensor, number: int) -> Tensor:  # noqa: ARG001 -- the operator's signature
    return x_TD.new_empty(number, x_TD.shape[1])


@triton.jit(do_not_specialize=["tokens", "number"])
def _gather_rows_kernel(
    x,
    slots,
    out,
    tokens,
    number,
    width,
    stride,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    for place in range(MOST):
        slot = tl.load(slots + row * MOST + place, mask=row < tokens, other=number)
        tl.store(out + slot[:, None] * width + column[None, :], values, mask=inside & (slot[:, None] < number))


def sum_rows(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
    """The reference's `sum_rows` for float32 and bfloat16; sums are taken in float32."""
    return torch.ops.deepseek_v3.sum_rows(rows_XD, slots_TM)


@custom_op("sum_rows")  # torch.compile calls it without looking inside
def _sum_rows(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
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


@fake_of(_sum_rows)
def _(rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
    return rows_XD.new_empty(slots_TM.shape[0], rows_XD.shape[1])


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


def sort_into_bins(experts_TK: Tensor, bins: ExpertBins, once: bool = False) -> BinOrder:
    """The reference's `sort_into_bins`."""
    if not experts_TK.numel():
        return reference.sort_into_bins(experts_TK, bins, once)
    experts_TK = experts_TK if experts_TK.stride(1) == 1 else experts_TK.contiguous()
    (tokens, chosen), device = experts_TK.shape, experts_TK.device
    tokens_N, choices_N = torch.empty(2, experts_TK.numel(), dtype=torch.int64, device=device)
    places_TK = torch.empty(tokens, chosen, dtype=torch.int64, device=device)
    ends_B = torch.empty(bins.number, dtype=torch.int32, device=device)
    counts_B2 = torch.empty(bins.number, 2, dtype=torch.int64, device=device)
    columns = triton.next_power_of_2(chosen)
    rows = max(1, _CHOICES // columns)
    blocks = triton.cdiv(tokens, rows)
    table = torch.empty(2, bins.number, blocks, dtype=torch.int32, device=device)
    choice = (experts_TK, experts_TK.stride(0), tokens, bins.first, bins.size)
    shape = {"CHOSEN": chosen, "COLUMNS": columns, "ROWS": rows, "ONCE": once}
    _count_kernel[bins.number, blocks](*choice, table, **shape)
    _place_kernel[bins.number, blocks](
        *choice, table, tokens_N, choices_N, places_TK, ends_B, counts_B2, COUNTS=_COUNTS, **shape
    )
    return BinOrder(tokens_N, choices_N, places_TK, ends_B, counts_B2)


@triton.jit(do_not_specialize=["stride", "tokens", "first", "size"])
def _count_kernel(
    experts,
    stride,
    tokens,
    first,
    size,
    table,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ONCE: tl.constexpr,
):
    own, block = tl.program_id(0), tl.program_id(1)
    _, _, offset = _offsets(experts, stride, tokens, first, CHOSEN, COLUMNS, ROWS)
    chosen = ((offset >= own * size) & (offset < (own + 1) * size)).to(tl.int32)
    per_token = tl.max(chosen, 1) if ONCE else tl.sum(chosen, 1)
    entry = table + own * tl.num_programs(1) + block
    tl.store(entry, tl.sum(per_token, 0))
    tl.store(entry + tl.num_programs(0) * tl.num_programs(1), tl.sum(tl.sum(chosen, 1), 0))


@triton.jit(do_not_specialize=["stride", "tokens", "first", "size"])
def _place_kernel(
    experts,
    stride,
    tokens,
    first,
    size,
    table,
    tokens_out,
    choices_out,
    places_out,
    ends_out,
    counts_out,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ONCE: tl.constexpr,
    COUNTS: tl.constexpr,
):
    own, block = tl.program_id(0), tl.program_id(1)
    bins, blocks = tl.num_programs(0), tl.num_programs(1)
    token, inside, offset = _offsets(experts, stride, tokens, first, CHOSEN, COLUMNS, ROWS)
    choice = token.to(tl.int64)[:, None] * CHOSEN + tl.arange(0, COLUMNS)[None, :]
    nowhere = tokens.to(tl.int64) * CHOSEN
    chosen = (offset >= own * size) & (offset < (own + 1) * size)
    nth = tl.cumsum(chosen.to(tl.int32), 1)
    placed = chosen & (nth == 1) if ONCE else chosen
    per_token = tl.sum(placed.to(tl.int32), 1)
    start = _sum_of(table, own * blocks + block, COUNTS)
    place = start + (tl.cumsum(per_token, 0) - per_token)[:, None] + nth - 1

    tl.store(tokens_out + place, tl.broadcast_to(token.to(tl.int64)[:, None], (ROWS, COLUMNS)), mask=placed)
    tl.store(choices_out + place, choice, mask=placed)
    tl.store(places_out + choice, place.to(tl.int64), mask=placed)
    tl.store(places_out + choice, tl.zeros_like(choice) + nowhere, mask=chosen & (placed == 0))
    if own == 0:
        outside = inside & ((offset < 0) | (offset >= bins * size))
        tl.store(places_out + choice, tl.zeros_like(choice) + nowhere, mask=outside)
    if block == blocks - 1:
        tl.store(ends_out + own, start + tl.sum(per_token, 0))
        tl.store(counts_out + 2 * own, _sum_of(table + own * blocks, blocks, COUNTS).to(tl.int64))
        tl.store(counts_out + 2 * own + 1, _sum_of(table + (bins + own) * blocks, blocks, COUNTS).to(tl.int64))


@triton.jit
def _offsets(experts, stride, tokens, first, CHOSEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The tokens of this program's block, which entries are choices, and the choices as offsets from `first`."""
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (token[:, None] < tokens) & (column[None, :] < CHOSEN)
    at = token.to(tl.int64)[:, None] * stride + column[None, :]
    expert = tl.load(experts + at, mask=inside, other=0).to(tl.int32)
    return token, inside, tl.where(inside, expert - first, -1)


@triton.jit
def _sum_of(counts, number, COUNTS: tl.constexpr):
    total = 0
    for start in range(0, number, COUNTS):
        at = start + tl.arange(0, COUNTS)
        total += tl.sum(tl.load(counts + at, mask=at < number, other=0), 0)
    return total

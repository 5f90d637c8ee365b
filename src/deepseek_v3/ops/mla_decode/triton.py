"""Absorbed latent attention over a paged cache, and writing to the cache, on an Ampere GPU or a newer one.

A sequence is cut into parts along its length. Their size follows from its length alone, so that its result has the
same bits whatever the other sequences are and however wide the page table is. An item of work is one part of one
sequence for one tile of its queries. A fixed number of programs takes the items in turn and finds them on the
device, from the lengths, so that a wide page table costs no empty programs. A second kernel combines the parts in
their order.

The sums of a tile stay in registers: 64 × 512 of them are 128 for each thread of 8 warps. To divide the value width
among programs would read every row twice and multiply it by the queries twice. Codes of e4m3 are exact in the type
of the queries, which the tensor cores multiply; the scales are applied in float32 to the scores, and to the weights
of the softmax. No dequantized row exists anywhere.

Axes: B batch, S new tokens, H heads, M pages of a sequence, C kv rank, R rotary width, L = C + R, N rows,
Z = R/2 pairs, X = S · H queries of a sequence, I parts of a sequence.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.early_launch.triton import early, wait
from deepseek_v3.ops.fp8.formats import BLOCK, E4M3
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.operation import multiprocessors

# A part has 512 tokens, of sequences of up to 2048, and 1024 of longer ones; from 32,768 on it has twice as many
# each time that the length grows by a factor of 4: 4 parts of 4096 tokens, 32 of 32,768, 64 of 131,072. Shorter
# parts fill the GPU with fewer sequences, and cost more for their sums: those of 128 heads are as many bytes,
# written and read, as 455 tokens in bfloat16.
_SHORTEST, _LIMIT, _DOUBLINGS = 512, 2048, 7
_LENGTHS = 256  # lengths that a program reads at a time
_COMBINED = 8  # parts that a program combines at a time

_N = tl.constexpr(BLOCK)
_FIRST_PART, _FIRST_LIMIT = tl.constexpr(_SHORTEST), tl.constexpr(_LIMIT)
_PART_DOUBLINGS = tl.constexpr(_DOUBLINGS)
_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LARGEST = tl.constexpr(torch.finfo(E4M3).max)
_SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)


class _Tile(NamedTuple):
    """Queries by keys of a tile; `stages`: blocks of keys in flight; `programs`: those of a multiprocessor."""

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int


def mla_decode(
    q_BSHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, layout: LatentFormat, scale: float
) -> tuple[Tensor, Tensor]:
    """The reference's `mla_decode` for float32, bfloat16 and float16 queries, and pages of these types or FP8.

    Cached numbers and weights of the softmax are rounded to the type of the queries before they are multiplied;
    everything else is float32. The host reads shapes only, so that a CUDA graph can hold the launches. The parts
    take memory for B · I · X · (C + 1) float32 numbers, with the largest I that M pages allow.
    """
    batch, new, heads, _ = q_BSHL.shape
    queries, rank = new * heads, layout.rank
    out_BSHC = q_BSHL.new_empty(batch, new, heads, rank)
    sums_BSH = q_BSHL.new_empty(batch, new, heads, dtype=torch.float32)
    if not batch * queries:
        return out_BSHC, sums_BSH
    most = most_parts(table_BM.shape[1] * PAGE)
    parts_BIXC = q_BSHL.new_empty(batch, most, queries, rank, dtype=torch.float32)
    part_sums_BIX = q_BSHL.new_empty(batch, most, queries, dtype=torch.float32)
    lengths_B = lengths_B.contiguous()
    tile = _tile(queries, layout, q_BSHL.dtype, q_BSHL.device)
    programs = min(
        multiprocessors(q_BSHL.device) * tile.programs, batch * most * triton.cdiv(queries, tile.queries)
    )
    if most:
        _decode_kernel[(programs,)](
            q_BSHL.contiguous(),
            pages,
            *_typed_pages(pages, layout),
            table_BM.contiguous(),
            lengths_B,
            parts_BIXC,
            part_sums_BIX,
            out_BSHC,
            sums_BSH,
            batch,
            most,
            heads,
            queries,
            pages.stride(0),
            table_BM.shape[1],
            scale,
            NEW=new,
            RANK=rank,
            CHUNK=_chunk(layout, q_BSHL.dtype),
            ROPE=layout.rope,
            ROPE_BLOCK=max(16, triton.next_power_of_2(layout.rope)),
            ROW=pages.stride(1),
            NATIVE=_converts_e4m3(q_BSHL.device),
            QUERIES=tile.queries,
            KEYS=tile.keys,
            PAGE=PAGE,
            LENGTHS=_LENGTHS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    _combine_kernel[(batch * queries,)](
        parts_BIXC,
        part_sums_BIX,
        lengths_B,
        out_BSHC,
        sums_BSH,
        most,
        queries,
        RANK=rank,
        RANK_BLOCK=triton.next_power_of_2(rank),
        PARTS=_COMBINED,
    )
    return out_BSHC, sums_BSH


def write_latents(
    pages: Tensor,
    slots_N: Tensor,
    kv_NL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_NZ: Tensor,
    sin_NZ: Tensor,
    layout: LatentFormat,
) -> None:
    """The reference's `write_latents` for float32, bfloat16 and float16, in one kernel; a program writes a row."""
    if not len(slots_N):
        return
    if kv_NL.stride(-1) != 1:
        kv_NL = kv_NL.contiguous()
    _write_kernel[(len(slots_N),)](
        pages,
        *_typed_pages(pages, layout),
        slots_N,
        kv_NL,
        norm_C.contiguous(),
        cos_NZ.contiguous(),
        sin_NZ.contiguous(),
        eps,
        kv_NL.stride(0),
        pages.stride(0),
        slots_N.stride(0),
        RANK=layout.rank,
        RANK_BLOCK=max(_N.value if layout.is_fp8 else 1, triton.next_power_of_2(layout.rank)),
        ROPE=layout.rope,
        PAIR_BLOCK=triton.next_power_of_2(layout.rope // 2),
        ROW=pages.stride(1),
        NATIVE=_converts_e4m3(pages.device),
        PAGE=PAGE,
        **early(pages.device),
    )


def part_length(length: int) -> int:
    """Tokens of each part of a sequence but the last one."""
    return _SHORTEST << sum(length > limit for limit in _limits())


def _limits() -> list[int]:
    """The lengths above which parts are twice as long, and twice again."""
    return [_LIMIT << 2 * doubling + 2 * (doubling > 0) for doubling in range(_DOUBLINGS)]


def most_parts(capacity: int) -> int:
    """The largest number of parts of any sequence of at most `capacity` tokens."""
    limits = [min(capacity, limit) for limit in _limits()]
    return max(triton.cdiv(length, part_length(length)) for length in (capacity, *limits))


def _typed_pages(pages: Tensor, layout: LatentFormat) -> tuple[Tensor | None, Tensor | None]:
    """Pages of bytes as float32 and as bfloat16 numbers; None for wide rows."""
    return (pages.view(torch.float32), pages.view(torch.bfloat16)) if layout.is_fp8 else (None, None)


@cache
def _describe(device: torch.device) -> tuple[bool, int]:
    """Whether a GPU is of the Hopper generation, as if where Triton's interpreter runs, and its shared memory."""
    if device.type != "cuda":
        return True, 228
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return torch.cuda.get_device_capability(device)[0] == 9, shared // 1024


@cache
def _converts_e4m3(device: torch.device) -> bool:
    """Whether the device has instructions that convert e4m3; else whole numbers are used."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _tile(queries: int, layout: LatentFormat, dtype: torch.dtype, device: torch.device) -> _Tile:
    """The tile for S · H queries of a sequence: never for the number of sequences, on which no bit may depend.

    A Hopper GPU multiplies 64 rows at a time, and holds the queries and two blocks of 64 cached rows in its shared
    memory; other GPUs need more memory for the same tile. With 8 warps the sums leave registers for the rest.
    """
    if dtype == torch.float32:
        return _Tile(16, 16, warps=8, stages=1, programs=1)
    is_hopper, shared_kib = _describe(device)
    if queries > 32 and is_hopper:
        return _Tile(64, 64, warps=8, stages=2, programs=1)
    if queries > 32 and shared_kib >= 164 and not layout.is_fp8:
        return _Tile(64, 32, warps=8, stages=2, programs=1)
    if queries > 16:
        return _Tile(32, 32, warps=8, stages=3 if shared_kib >= 164 else 2, programs=1)
    if layout.is_fp8:
        return _Tile(16, 32, warps=8, stages=3, programs=1)
    return _Tile(16, 32, warps=4, stages=3, programs=2)


def _chunk(layout: LatentFormat, dtype: torch.dtype) -> int:
    """Columns of the latent that a product has at a time.

    A block of codes shares a scale, and products in float32 have no tensor cores, so that they need more registers.
    """
    width = max(16, triton.next_power_of_2(layout.rank))
    return min(BLOCK, width) if layout.is_fp8 or dtype == torch.float32 else width


# The kernels


@triton.jit
def _part_length(length):
    part = _FIRST_PART
    for doubling in tl.static_range(_PART_DOUBLINGS):
        limit = _FIRST_LIMIT << (2 * doubling + 2 * (doubling > 0))
        part += tl.where(length > limit, _FIRST_PART << doubling, 0)
    return part


@triton.jit
def _number_of_parts(lengths, first, batch, LENGTHS: tl.constexpr):
    """The parts of the sequences first, first + 1, …"""
    sequence = first + tl.arange(0, LENGTHS)
    length = tl.load(lengths + sequence, mask=sequence < batch, other=0).to(tl.int32)
    return tl.cdiv(length, _part_length(length))


@triton.jit
def _find_part(place, lengths, batch, LENGTHS: tl.constexpr):
    """The sequence and the part, of this sequence, that come at a place among the parts of all sequences."""
    sequence, before, passed = 0, 0, 0
    for first in range(0, batch, LENGTHS):
        parts = _number_of_parts(lengths, first, batch, LENGTHS)
        end = passed + tl.cumsum(parts, 0)
        inside = first + tl.arange(0, LENGTHS) < batch
        sequence += tl.sum(((end <= place) & inside).to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(end <= place, end, 0), 0))
        passed += tl.sum(parts, 0)
    return sequence, place - before


@triton.jit
def _from_e4m3(codes, KIND: tl.constexpr, NATIVE: tl.constexpr):
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(KIND)
    magnitude = codes.to(tl.int32) & 0x7F
    # Exponent and fraction in their places in a float32, whose exponent has a bias that is 120 larger.
    x = (magnitude << 20).to(tl.float32, bitcast=True) * 2.0**120
    x = tl.where(magnitude == 0x7F, float("nan"), x)
    return tl.where(codes.to(tl.int32) >= 0x80, -x, x).to(KIND)


@triton.jit
def _float32_to_e4m3(x, NATIVE: tl.constexpr):
    """The codes, uint8, of numbers that round to at most 448, or NaN; rounded to nearest, ties to even."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below 2⁻⁶ codes are multiples of 2⁻⁹, which is the last bit of float32 numbers from 2¹⁴ on.
    small = (tl.abs(x) + 2.0**14).to(tl.int32, bitcast=True) - 0x46800000
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["batch", "most_parts", "pages_per_sequence"])
def _decode_kernel(
    q,
    pages,
    scales,
    ropes,
    table,
    lengths,
    parts_out,
    part_sums_out,
    out,
    sums_out,
    batch,
    most_parts,
    heads,
    queries,
    page_stride,
    pages_per_sequence,
    softmax_scale,
    NEW: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    NATIVE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    KIND: tl.constexpr = q.dtype.element_ty
    CHUNKS: tl.constexpr = (RANK + CHUNK - 1) // CHUNK
    # Of codes, the weights are multiplied by scales, which may be too small for float16.
    WEIGHT: tl.constexpr = tl.bfloat16 if scales is not None and tl.float16 == KIND else KIND
    tiles = tl.cdiv(queries, QUERIES)
    total = 0
    for first in range(0, batch, LENGTHS):
        total += tl.sum(_number_of_parts(lengths, first, batch, LENGTHS), 0)
    # Numbers that every item needs, as the places of a tile, are computed anew: registers are scarcer than time.
    for item in tl.range(tl.program_id(0), total * tiles, tl.num_programs(0), disable_licm=True):
        sequence, part = _find_part(item // tiles, lengths, batch, LENGTHS)
        length = tl.load(lengths + sequence).to(tl.int32)
        size = _part_length(length)
        begin = part * size
        end = tl.minimum(begin + size, length)

        query = item % tiles * QUERIES + tl.arange(0, QUERIES)
        here = (query < queries)[:, None]
        column, turned = tl.arange(0, CHUNK)[None, :], tl.arange(0, ROPE_BLOCK)[None, :]
        q_at = q + sequence.to(tl.int64) * queries * (RANK + ROPE) + query[:, None] * (RANK + ROPE)
        q_rope = tl.load(q_at + RANK + turned, mask=here & (turned < ROPE), other=0.0)
        q_latents, sums = tl.tuple(()), tl.tuple(())
        for chunk in tl.static_range(CHUNKS):
            q_mask = here & (chunk * CHUNK + column < RANK)
            q_latents += (tl.load(q_at + chunk * CHUNK + column, mask=q_mask, other=0.0),)
            sums += (tl.zeros((QUERIES, CHUNK), tl.float32),)
        visible = tl.minimum(length - (NEW - 1) + query // heads, end)[:, None]  # the keys before it

        largest = tl.full((QUERIES,), float("-inf"), tl.float32)
        weights = tl.zeros((QUERIES,), tl.float32)
        page_at = table + sequence.to(tl.int64) * pages_per_sequence
        next_page = tl.load(page_at + begin // PAGE)
        for start in tl.range(begin, end, KEYS, disable_licm=True):
            # The page of the next block is read now, because the addresses of that block wait for it.
            page = next_page.to(tl.int64) * page_stride
            next_page = tl.load(page_at + tl.minimum(start + KEYS, end - 1) // PAGE)
            key = start + tl.arange(0, KEYS)
            row = tl.arange(0, KEYS) * ROW
            if KEYS != PAGE:
                row += start % PAGE * ROW
            inside = key < end

            rope_mask = inside[:, None]
            if ROPE != ROPE_BLOCK:
                rope_mask = rope_mask & (turned < ROPE)
            if scales is None:
                rope = tl.load(pages + page + (row[:, None] + RANK + turned), mask=rope_mask, other=0.0)
            else:
                rope_at = row[:, None] // 2 + (RANK + RANK // 32) // 2 + turned
                rope = tl.load(ropes + page // 2 + rope_at, mask=rope_mask, other=0.0)
            score = tl.dot(q_rope, tl.trans(rope.to(KIND)), input_precision="ieee")
            latents = tl.tuple(())
            for chunk in tl.static_range(CHUNKS):
                mask = inside[:, None]
                if RANK % CHUNK:
                    mask = mask & (chunk * CHUNK + column < RANK)
                codes = tl.load(pages + page + (row[:, None] + chunk * CHUNK + column), mask=mask, other=0)
                if scales is None:
                    latent = codes.to(KIND)
                    latents += (latent,)
                    score = tl.dot(q_latents[chunk], tl.trans(latent), score, input_precision="ieee")
                else:
                    latent = _from_e4m3(codes, KIND, NATIVE)
                    factor = tl.load(scales + page // 4 + (row // 4 + RANK // 4 + chunk), mask=inside, other=0.0)
                    product = tl.dot(q_latents[chunk], tl.trans(latent), input_precision="ieee")
                    score += product * factor[None, :]
                    latents += (latent if WEIGHT == KIND else _from_e4m3(codes, WEIGHT, NATIVE),)

            visible_key = key[None, :] < visible
            score = tl.where(visible_key, score * (softmax_scale * _LOG2_E), float("-inf"))
            larger = tl.maximum(largest, tl.max(score, 1))
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(score - finite[:, None])
            kept = tl.exp2(largest - finite)
            weights = weights * kept + tl.sum(weight, 1)
            largest = larger
            new_sums = tl.tuple(())
            for chunk in tl.static_range(CHUNKS):
                factor = weight
                if scales is not None:
                    # Read anew, because registers are scarce; `other` keeps the compiler from merging the loads.
                    factor = tl.load(scales + page // 4 + (row // 4 + RANK // 4 + chunk), mask=inside, other=1.0)
                    factor = weight * factor[None, :]
                new_sums += (
                    tl.dot(factor.to(WEIGHT), latents[chunk], sums[chunk] * kept[:, None], input_precision="ieee"),
                )
            sums = new_sums

        divisor = tl.where(weights == 0, 1.0, weights)
        log_sum = largest * _LN_2 + tl.log(divisor)
        if size >= length:
            at = sequence.to(tl.int64) * queries + query
            for chunk in tl.static_range(CHUNKS):
                mask = here & (chunk * CHUNK + column < RANK)
                result = (sums[chunk] / divisor[:, None]).to(KIND)
                tl.store(out + at[:, None] * RANK + (chunk * CHUNK + column), result, mask=mask)
            tl.store(sums_out + at, log_sum, mask=query < queries)
        else:
            at = (sequence.to(tl.int64) * most_parts + part) * queries + query
            for chunk in tl.static_range(CHUNKS):
                mask = here & (chunk * CHUNK + column < RANK)
                tl.store(
                    parts_out + at[:, None] * RANK + (chunk * CHUNK + column),
                    sums[chunk] / divisor[:, None],
                    mask=mask,
                )
            tl.store(part_sums_out + at, log_sum, mask=query < queries)


@triton.jit(do_not_specialize=["most_parts"])
def _combine_kernel(
    parts_in,
    part_sums,
    lengths,
    out,
    sums_out,
    most_parts,
    queries,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combines the parts of one query; a single part already stands in the result."""
    sequence, query = tl.program_id(0).to(tl.int64) // queries, tl.program_id(0) % queries
    length = tl.load(lengths + sequence).to(tl.int32)
    parts = tl.cdiv(length, _part_length(length))
    if parts == 1:
        return
    column = tl.arange(0, RANK_BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    total_weight = tl.zeros((), tl.float32)
    total = tl.zeros((RANK_BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (sequence * most_parts + part) * queries + query
        log_sum = tl.load(part_sums + at, mask=part < parts, other=float("-inf"))
        here = (part < parts)[:, None] & (column < RANK)[None, :]
        sums = tl.load(parts_in + at[:, None] * RANK + column[None, :], mask=here, other=0.0)
        larger = tl.maximum(largest, tl.max(log_sum, 0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp(log_sum - finite)
        kept = tl.exp(largest - finite)
        total_weight = total_weight * kept + tl.sum(weight, 0)
        total = total * kept + tl.sum(sums * weight[:, None], 0)
        largest = larger
    divisor = tl.where(total_weight == 0, 1.0, total_weight)
    at = sequence * queries + query
    tl.store(out + at * RANK + column, (total / divisor).to(out.dtype.element_ty), mask=column < RANK)
    tl.store(sums_out + at, largest + tl.log(divisor))


@triton.jit
def _write_kernel(
    pages,
    scales,
    ropes,
    slots,
    kv,
    norm,
    cos,
    sin,
    eps,
    kv_stride,
    page_stride,
    slot_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    NATIVE: tl.constexpr,
    PAGE: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    if slot < 0:
        return
    KIND: tl.constexpr = kv.dtype.element_ty
    begin = slot // PAGE * page_stride + slot % PAGE * ROW
    column = tl.arange(0, RANK_BLOCK)
    x = tl.load(kv + token * kv_stride + column, mask=column < RANK, other=0.0).to(tl.float32)
    weight = tl.load(norm + column, mask=column < RANK, other=0.0).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * weight).to(KIND)

    pair = tl.arange(0, PAIR_BLOCK)
    cosine = tl.load(cos + token * (ROPE // 2) + pair, mask=pair < ROPE // 2, other=0.0)
    sine = tl.load(sin + token * (ROPE // 2) + pair, mask=pair < ROPE // 2, other=0.0)
    turned = tl.arange(0, 2 * PAIR_BLOCK)
    turning = tl.load(kv + token * kv_stride + RANK + turned, mask=turned < ROPE, other=0.0)
    even, odd = tl.split(tl.reshape(turning.to(tl.float32), (PAIR_BLOCK, 2)))
    rope = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (2 * PAIR_BLOCK,)).to(KIND)

    if scales is None:
        tl.store(pages + begin + column, x.to(pages.dtype.element_ty), mask=column < RANK)
        tl.store(pages + begin + RANK + turned, rope.to(pages.dtype.element_ty), mask=turned < ROPE)
    else:
        GROUPS: tl.constexpr = RANK_BLOCK // _N
        numbers = tl.reshape(x.to(tl.float32), (GROUPS, _N))
        magnitude = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as whole numbers, they lie below NaN
        largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
        scale = tl.math.div_rn(largest, _LARGEST)
        scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)  # leaves NaN as it is
        # Adding ones in the place of the fraction carries into the exponent, unless the fraction is zero.
        power = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale == scale, power, scale)
        codes = _float32_to_e4m3(numbers * tl.math.div_rn(1.0, scale)[:, None], NATIVE)
        tl.store(pages + begin + column, tl.reshape(codes, (RANK_BLOCK,)), mask=column < RANK)
        group = tl.arange(0, GROUPS)
        tl.store(scales + (begin + RANK) // 4 + group, scale, mask=group < RANK // _N)
        at = ropes + (begin + RANK + RANK // 32) // 2 + turned
        tl.store(at, rope.to(tl.bfloat16), mask=turned < ROPE)

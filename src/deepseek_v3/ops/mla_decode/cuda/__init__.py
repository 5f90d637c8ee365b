"""Absorbed latent attention over a paged cache in CUDA C++, for Hopper (compute capability 9.0).

`decode.cu` describes its kernels. Rows are written by the Triton back end, which is as fast as memory.

Axes: B batch, S new tokens, H heads, M pages of a sequence, C kv rank, L width of a query, I parts of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.ops.fp8.formats import BLOCK
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.mla_decode.triton import write_latents
from deepseek_v3.ops.nvrtc import Kernel, TensorMap, current_device, tensor_map
from deepseek_v3.ops.operation import multiprocessors

__all__ = ["kernels", "mla_decode", "most_parts", "part_tokens", "write_latents"]

_SOURCE = Path(__file__).with_name("decode.cu")

# A sequence has `PARTS` parts of at most `LONGEST_PART` tokens and at least `_shortest_part`, but at most
# `MOST_PARTS`. More parts fill the GPU with fewer sequences, and are more sums to add. Parts of sequences longer
# than `LONG`, of which few fit into memory, are at most half as long.
PARTS, LONGEST_PART, MOST_PARTS, LONG = 4, 2048, 64, 16384
SHORTEST_PART, SHORTEST_PART_OF_FEW_ROWS, FEW_ROWS = 512, 128, 16

VARIANTS = ((512, False), (512, True), (256, False))  # width of the latent, and whether rows are FP8

_ROWS, _COLUMNS, _THREADS = 64, 64, 384  # of a tile; of a thread block
_ADDING_THREADS, _ADDING_BLOCKS = 128, 4  # of the second kernel: of a thread block; for each multiprocessor
_ADDED_COLUMNS = 128  # by a warp of it
_KERNELS = ("mla_decode", "mla_decode_parts")
_LOG2_E = 1.4426950408889634


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("batch", "queries", "heads", "parts", "shortest", "table_width")]
    _fields_ += [("scale", ctypes.c_float)]


def mla_decode(
    q_BSHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, layout: LatentFormat, scale: float
) -> tuple[Tensor, Tensor]:
    """The reference's `mla_decode` for bfloat16 queries and pages of bfloat16 or FP8.

    Weights of the softmax, and numbers of FP8 times their scales, are rounded to bfloat16 before they are
    multiplied; everything else is float32. The host reads shapes only. Parts take memory for
    B · I · S · H · (C + 4) float32 numbers, with the largest I that M pages allow, and 64 · C more for each
    multiprocessor.
    """
    batch, new, heads, _ = q_BSHL.shape
    rows, rank = new * heads, layout.rank
    out_BSHC = q_BSHL.new_empty(batch, new, heads, rank)
    sums_BSH = q_BSHL.new_empty(batch, new, heads, dtype=torch.float32)
    if not batch * rows:
        return out_BSHC, sums_BSH
    processors, tiles = multiprocessors(q_BSHL.device), -(-rows // _ROWS)
    parts = most_parts(table_BM.shape[1] * PAGE, rows)
    blocks = min(max(1, processors // tiles), batch * parts) * tiles
    variant = rank, layout.is_fp8
    divided = parts if parts > 1 else 0
    parts_BIXC = q_BSHL.new_empty(batch, divided, rows, rank, dtype=torch.float32)
    part_rows_BIX4 = q_BSHL.new_empty(batch, divided, rows, 4, dtype=torch.float32)
    added_B = q_BSHL.new_empty(batch, dtype=torch.int32)
    kept = q_BSHL.new_empty(blocks if divided else 0, _ROWS, rank, dtype=torch.float32)
    sizes = _Sizes(batch, new, heads, parts, _shortest_part(rows), table_BM.shape[1], scale * _LOG2_E)
    lengths_B = lengths_B.contiguous()
    results = [out_BSHC, sums_BSH, parts_BIXC, part_rows_BIX4, added_B]
    with current_device(q_BSHL.device):
        queries = tensor_map(q_BSHL.contiguous().flatten(0, 2), _ROWS, _COLUMNS, swizzle=True)
        given = [queries, *_page_maps(pages.flatten(0, 1), layout), table_BM.contiguous(), lengths_B]
        _kernel("mla_decode", *variant).launch(blocks, _THREADS, [*given, *results, kept, sizes])
        if divided:
            units = -(-rows * (rank // _ADDED_COLUMNS) // (_ADDING_THREADS // 32))
            each = max(1, min(units, _ADDING_BLOCKS * processors // batch))
            adding = _kernel("mla_decode_parts", *variant)
            adding.launch(batch * each, _ADDING_THREADS, [lengths_B, *results, sizes], early=True)
    return out_BSHC, sums_BSH


def _page_maps(rows_ND: Tensor, layout: LatentFormat) -> tuple[TensorMap, TensorMap, TensorMap]:
    """Of rows of numbers; or of the bytes, the scales, and the rotated numbers of FP8 rows."""
    if not layout.is_fp8:
        return (tensor_map(rows_ND, PAGE, _COLUMNS, swizzle=True),) * 3
    return (
        tensor_map(rows_ND, PAGE, BLOCK),
        tensor_map(rows_ND.view(torch.float32), PAGE, layout.rank // BLOCK),
        tensor_map(rows_ND.view(torch.bfloat16), PAGE, _COLUMNS, swizzle=True),
    )


def part_tokens(length: int, rows: int) -> int:
    """The tokens of a part of a sequence with this many queries · heads, as the kernel computes it."""
    pair = 2 * PAGE

    def share(parts: int) -> int:
        return -(-length // (pair * parts)) * pair

    return max(min(max(share(PARTS), _shortest_part(rows)), _longest_part(length)), share(MOST_PARTS))


def most_parts(capacity: int, rows: int) -> int:
    """The largest number of parts of any sequence of at most `capacity` tokens."""
    few = min(PARTS, -(-capacity // _shortest_part(rows)))
    return max(1, few, min(MOST_PARTS, -(-capacity // _longest_part(capacity))))


def _shortest_part(rows: int) -> int:
    """The sums of few rows are few, too."""
    return SHORTEST_PART_OF_FEW_ROWS if rows <= FEW_ROWS else SHORTEST_PART


def _longest_part(length: int) -> int:
    return LONGEST_PART // (2 if length > LONG else 1)


def kernels() -> Iterator[Kernel]:
    """Every variant of the kernels."""
    yield from (_kernel(name, *variant) for variant in VARIANTS for name in _KERNELS)


@cache
def _kernel(name: str, rank: int, is_fp8: bool) -> Kernel:
    parts = {"PARTS": PARTS, "LONGEST_PART": LONGEST_PART, "MOST_PARTS": MOST_PARTS}
    defines = {"RANK": rank, "FP8": int(is_fp8), "LONG": LONG, **parts}
    return Kernel(_SOURCE, name, defines, _shared_bytes(rank) if name == "mla_decode" else 0)


def _shared_bytes(rank: int) -> int:
    """Queries and two blocks of keys with their scales; maxima and sums of rows; barriers; the tiles' alignment."""
    tiles, scales = 3 * (rank // _COLUMNS + 1) * _ROWS * _COLUMNS * 2, 2 * PAGE * (rank // BLOCK) * 4
    return tiles + scales + 4 * _ROWS * 4 + 16 * 8 + 1024

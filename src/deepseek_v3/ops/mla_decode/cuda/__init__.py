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

from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.mla_decode.triton import write_latents
from deepseek_v3.ops.nvrtc import Kernel, current_device, tensor_map
from deepseek_v3.ops.operation import multiprocessors

__all__ = ["kernels", "mla_decode", "most_parts", "part_tokens", "write_latents"]

_SOURCE = Path(__file__).with_name("decode.cu")

# A part has a quarter of its sequence's tokens, but at least `SHORTEST_PART` and at most `LONGEST_PART`: more parts
# fill the GPU with fewer sequences, and write and read more sums.
SHORTEST_PART, LONGEST_PART = 512, 2048

VARIANTS = ((512, False), (512, True), (256, False))  # width of the latent, and whether rows are FP8

_ROWS, _COLUMNS, _THREADS = 64, 64, 384  # of a tile; of a thread block
_LOG2_E = 1.4426950408889634


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("batch", "queries", "heads", "parts", "table_width")]
    _fields_ += [("scale", ctypes.c_float)]


def mla_decode(
    q_BSHL: Tensor, pages: Tensor, table_BM: Tensor, lengths_B: Tensor, layout: LatentFormat, scale: float
) -> tuple[Tensor, Tensor]:
    """The reference's `mla_decode` for bfloat16 queries and pages of bfloat16 or FP8.

    Weights of the softmax, and numbers of FP8 times their scales, are rounded to bfloat16 before they are
    multiplied; everything else is float32. The host reads shapes only. The parts take memory for B · I · S · H ·
    (C + 1) float32 numbers, with the largest I that M pages allow.
    """
    batch, new, heads, _ = q_BSHL.shape
    rows, rank = new * heads, layout.rank
    out_BSHC = q_BSHL.new_empty(batch, new, heads, rank)
    sums_BSH = q_BSHL.new_empty(batch, new, heads, dtype=torch.float32)
    if not batch * rows:
        return out_BSHC, sums_BSH
    parts = most_parts(table_BM.shape[1] * PAGE)
    divided = parts if parts > 1 else 0
    parts_BIXC = q_BSHL.new_empty(batch, divided, rows, rank, dtype=torch.float32)
    part_sums_BIX = q_BSHL.new_empty(batch, divided, rows, dtype=torch.float32)
    tiles = -(-rows // _ROWS)
    finished = q_BSHL.new_zeros(batch * tiles if divided else 0, dtype=torch.int32)
    sizes = _Sizes(batch, new, heads, parts, table_BM.shape[1], scale * _LOG2_E)
    results = [out_BSHC, sums_BSH, parts_BIXC, part_sums_BIX, finished]
    with current_device(q_BSHL.device):
        queries = tensor_map(q_BSHL.contiguous().flatten(0, 2), _ROWS, _COLUMNS, swizzle=True)
        # The kernel does not read the map of pages that have FP8 rows.
        keys = queries if layout.is_fp8 else tensor_map(pages.flatten(0, 1), PAGE, _COLUMNS, swizzle=True)
        _kernel(rank, layout.is_fp8).launch(
            min(multiprocessors(q_BSHL.device), batch * parts * tiles),
            _THREADS,
            [queries, keys, pages, table_BM.contiguous(), lengths_B.contiguous(), *results, sizes],
        )
    return out_BSHC, sums_BSH


def part_tokens(length: int) -> int:
    """The tokens of a part of a sequence, as the kernel computes it."""
    quarter = -(-length // (4 * PAGE)) * PAGE
    return min(max(quarter, SHORTEST_PART), LONGEST_PART)


def most_parts(capacity: int) -> int:
    """The largest number of parts of any sequence of at most `capacity` tokens."""
    # A sequence of less than four of the longest parts has at most four.
    shorter = min(capacity, 4 * LONGEST_PART)
    return max(1, min(4, -(-shorter // SHORTEST_PART)), -(-capacity // part_tokens(capacity)))


def kernels() -> Iterator[Kernel]:
    """Every variant of the kernel."""
    yield from (_kernel(rank, is_fp8) for rank, is_fp8 in VARIANTS)


@cache
def _kernel(rank: int, is_fp8: bool) -> Kernel:
    defines = {"RANK": rank, "FP8": int(is_fp8), "SHORTEST_PART": SHORTEST_PART, "LONGEST_PART": LONGEST_PART}
    tiles, numbers, barriers = 3 * (rank // _COLUMNS + 1) * _ROWS * _COLUMNS * 2, 4 * _ROWS * 4 + 8, 10 * 8
    return Kernel(_SOURCE, "mla_decode", defines, tiles + numbers + barriers + 1024)  # the tiles' alignment

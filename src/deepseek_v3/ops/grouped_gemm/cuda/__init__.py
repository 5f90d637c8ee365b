"""Float32 gradients of experts' weights on a Hopper GPU, in CUDA C++; `weight_gradient.cu` describes the kernel.

Axes: X rows in expert order, E experts, I input width, O output width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.ops.nvrtc import Kernel, current_device, tensor_map
from deepseek_v3.ops.operation import multiprocessors

_SOURCE = Path(__file__).with_name("weight_gradient.cu")
_TILE_ROWS, _TILE_COLUMNS, _THREADS = 128, 256, 384
_BLOCK, _BOX_COLUMNS = 64, 64  # rows that are summed at a time, and columns that are copied at a time
_STAGES = 4
# A stage with two barriers, and the alignment of the tiles; `weight_gradient.cu` lays them out.
_SHARED_BYTES = _STAGES * ((_TILE_ROWS + _TILE_COLUMNS) * _BLOCK * 2 + 16) + 1024


class _Sizes(ctypes.Structure):
    """The kernel's `Sizes`."""

    _fields_ = [(name, ctypes.c_int) for name in ("groups", "rows", "columns")]


def weight_gradient(grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> Tensor:
    """The reference's `weight_gradient` of bfloat16 rows, in float32; widths are multiples of 8."""
    (num_rows, output), width, groups = grad_XO.shape, x_XI.shape[1], len(ends_E)
    if not num_rows:
        return grad_XO.new_zeros(groups, output, width, dtype=torch.float32)
    grad_EOI = grad_XO.new_empty(groups, output, width, dtype=torch.float32)
    tiles = groups * -(-output // _TILE_ROWS) * -(-width // _TILE_COLUMNS)
    given = [grad_XO.contiguous(), x_XI.contiguous()]
    with current_device(grad_XO.device):
        maps = [tensor_map(rows, _BLOCK, _BOX_COLUMNS, swizzle=True) for rows in given]
        sizes = _Sizes(groups, output, width)
        blocks = min(tiles, multiprocessors(grad_XO.device))
        _kernel().launch(blocks, _THREADS, [*maps, ends_E.contiguous(), grad_EOI, sizes])
    return grad_EOI


def kernels() -> Iterator[Kernel]:
    """The kernel, which has one variant."""
    yield _kernel()


@cache
def _kernel() -> Kernel:
    return Kernel(_SOURCE, "grouped_weight_gradient", {}, _SHARED_BYTES)

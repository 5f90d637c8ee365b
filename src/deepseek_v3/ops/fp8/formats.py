"""Matrices in 8-bit floating point with one float32 scale per block (DeepSeek-V3 report, §3.3).

A number is its e4m3 value times the scale of its block. Rows in expert order form groups, one per expert: group e
holds rows ends[e-1] … ends[e]-1, and may be empty. If blocks lie along the rows, every group has a multiple of 128
places, so that no block holds rows of two groups.

Axes: X rows, D width, G = ⌈D / 128⌉ blocks of a row, P places, B = P / 128 blocks of places, E experts, O output
width, I input width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn


class RowBlocks(NamedTuple):
    """Rows (X, D) in blocks of 1×128 along the row: the left operand of forward and input-gradient products.

    `values_XD` e4m3, `scales_XG` float32, both contiguous.
    """

    values_XD: Tensor
    scales_XG: Tensor


class ColumnBlocks(NamedTuple):
    """The transpose of rows (X, D) in blocks of 1×128 along the rows: an operand of weight-gradient products.

    `values_DP` e4m3, `scales_BD` float32, both contiguous. Group e begins at place `group_starts(ends_E)[e]`. The
    places between the last row of a group and the next multiple of 128 hold zeros; places of blocks behind the last
    group, and the scales of these blocks, are undefined and never read.
    """

    values_DP: Tensor
    scales_BD: Tensor


class WeightBlocks(NamedTuple):
    """Weights (E, O, I) in blocks of 128×128, one weight per expert; a dense layer has E = 1.

    `values_EOI` e4m3, `scales` float32 (E, ⌈O / 128⌉, ⌈I / 128⌉), both contiguous.
    """

    values_EOI: Tensor
    scales: Tensor


def padded_places(num_rows: int, num_groups: int) -> int:
    """The places P of rows in groups, which the host knows without their sizes: at least as many as they need."""
    return (-(-num_rows // BLOCK) + num_groups - 1) * BLOCK


def group_starts(ends_E: Tensor) -> Tensor:
    """The first place of each group, int32, from the ends of the groups; without a host synchronisation."""
    blocks_E = ends_E.diff(prepend=ends_E.new_zeros(1)).add(BLOCK - 1).div(BLOCK, rounding_mode="floor")
    return ((blocks_E.cumsum(0) - blocks_E) * BLOCK).int()


def empty_rows(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Memory for `RowBlocks`, on the device of `like`."""
    values_XD = like.new_empty(rows, width, dtype=E4M3)
    return values_XD, like.new_empty(rows, -(-width // BLOCK), dtype=torch.float32)


def empty_columns(like: Tensor, rows: int, width: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Memory for `ColumnBlocks`, on the device of `like`."""
    places = padded_places(rows, groups)
    values_DP = like.new_empty(width, places, dtype=E4M3)
    return values_DP, like.new_empty(places // BLOCK, width, dtype=torch.float32)


def empty_gradients(
    grad_hidden_XF: Tensor, gates_X: Tensor | None, groups: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Memory for what `swiglu_backward` returns, in its order; the last one is empty without gates."""
    rows, width = grad_hidden_XF.shape
    return (
        empty_rows(grad_hidden_XF, rows, 2 * width),
        empty_columns(grad_hidden_XF, rows, 2 * width, groups),
        empty_columns(grad_hidden_XF, rows, width, groups),
        grad_hidden_XF.new_empty(0 if gates_X is None else rows, dtype=torch.float32),
    )

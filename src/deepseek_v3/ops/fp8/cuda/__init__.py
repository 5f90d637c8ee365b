"""Quantizing by columns on a Hopper GPU, in CUDA C++; `tiles.cu` says how the kernels work.

NVRTC compiles them at first use, in less than two seconds, unless they are built already. Triton's functions do
all else, and what the kernels do not take: rows that are not in bfloat16, are not aligned to 16 bytes or have no
multiple of 8 numbers, and a hidden layer whose width is no multiple of 128. Results are bit by bit the reference's;
SwiGLU's gradients may differ in their last bits, before they are quantized.

Axes: those of `reference.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import triton
from deepseek_v3.ops.fp8.formats import BLOCK, ColumnBlocks, RowBlocks, empty_columns, empty_gradients, empty_rows
from deepseek_v3.ops.fp8.triton import (
    gather_rows,
    quantize_rows,
    quantize_weight,
    requantize_columns,
    swiglu,
)
from deepseek_v3.ops.nvrtc import Kernel, current_device
from deepseek_v3.ops.operation import custom_op, fake_of

__all__ = [
    "gather_columns",
    "gather_rows",
    "kernels",
    "quantize_both",
    "quantize_columns",
    "quantize_rows",
    "quantize_weight",
    "requantize_columns",
    "swiglu",
    "swiglu_backward",
]

_SOURCE = Path(__file__).with_name("tiles.cu")
_THREADS = 256
# The shared memory of each kernel that it does not declare itself: the size of `Shared`.
_SHARED_BYTES = {"fp8_columns": 0, "fp8_rows_and_columns": 0, "fp8_swiglu_backward": 54272}
_PIECE = 8  # numbers in bfloat16 that a thread loads at once


def quantize_columns(x_TD: Tensor, power_of_two: bool) -> ColumnBlocks:
    return ColumnBlocks(*_quantize_columns(x_TD, power_of_two))


def quantize_both(x_TD: Tensor, power_of_two: bool) -> tuple[RowBlocks, ColumnBlocks]:
    values_TD, scales_TG, values_DP, scales_BD = _quantize_both(x_TD, power_of_two)
    return RowBlocks(values_TD, scales_TG), ColumnBlocks(values_DP, scales_BD)


def gather_columns(x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool) -> ColumnBlocks:
    return ColumnBlocks(*_gather_columns(x_RD, source_X, ends_E, power_of_two))


def swiglu_backward(
    kept: RowBlocks, grad_hidden_XF: Tensor, gates_X: Tensor | None, ends_E: Tensor | None, power_of_two: bool
) -> tuple[RowBlocks, ColumnBlocks, ColumnBlocks, Tensor | None]:
    found = _swiglu_backward(*kept, grad_hidden_XF, gates_X, ends_E, power_of_two)
    grad_gates_X = None if gates_X is None else found[6]
    return RowBlocks(*found[:2]), ColumnBlocks(*found[2:4]), ColumnBlocks(*found[4:6]), grad_gates_X


# The custom operations


@custom_op("fp8_quantize_columns_cuda")
def _quantize_columns(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _fits(x_TD):
        values_DP, scales_BD = triton.quantize_columns(x_TD, power_of_two)
        return values_DP, scales_BD
    columns = empty_columns(x_TD, *x_TD.shape)
    if x_TD.numel():
        _launch("fp8_columns", x_TD, len(x_TD), columns[0], power_of_two, [x_TD, None, None, *columns])
    return columns


fake_of(_quantize_columns)(triton.empty_for_columns)


@custom_op("fp8_quantize_both_cuda")
def _quantize_both(x_TD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _fits(x_TD):
        rows, columns = triton.quantize_both(x_TD, power_of_two)
        return *rows, *columns
    by_rows, by_columns = empty_rows(x_TD, *x_TD.shape), empty_columns(x_TD, *x_TD.shape)
    if x_TD.numel():
        arguments = [x_TD, *by_columns, *by_rows]
        _launch("fp8_rows_and_columns", x_TD, len(x_TD), by_columns[0], power_of_two, arguments)
    return *by_rows, *by_columns


fake_of(_quantize_both)(triton.empty_for_both)


@custom_op("fp8_gather_columns_cuda")
def _gather_columns(x_RD: Tensor, source_X: Tensor, ends_E: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _fits(x_RD) or source_X.dtype != torch.int64:
        values_DP, scales_BD = triton.gather_columns(x_RD, source_X, ends_E, power_of_two)
        return values_DP, scales_BD
    columns = empty_columns(x_RD, len(source_X), x_RD.shape[1], len(ends_E))
    if len(source_X) and x_RD.shape[1]:
        rows_B2 = triton.find_rows_of_blocks(ends_E, len(columns[1]))
        arguments = [x_RD, source_X.contiguous(), rows_B2, *columns]
        _launch("fp8_columns", x_RD, len(source_X), columns[0], power_of_two, arguments)
    return columns


fake_of(_gather_columns)(triton.empty_for_gathered)


@custom_op("fp8_swiglu_backward_cuda")
def _swiglu_backward(
    kept_XG2: Tensor,
    kept_scales: Tensor,
    grad_hidden_XF: Tensor,
    gates_X: Tensor | None,
    ends_E: Tensor | None,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = grad_hidden_XF.shape
    if width % BLOCK or not _fits(grad_hidden_XF):
        kept = RowBlocks(kept_XG2, kept_scales)
        grad_rows, grad_columns, hidden_columns, grad_gates_X = triton.swiglu_backward(
            kept, grad_hidden_XF, gates_X, ends_E, power_of_two
        )
        grad_gates = kept_scales.new_empty(0) if grad_gates_X is None else grad_gates_X
        return *grad_rows, *grad_columns, *hidden_columns, grad_gates
    groups = 1 if ends_E is None else len(ends_E)
    by_rows, by_columns, hidden_by_columns, grad_gates = empty_gradients(grad_hidden_XF, gates_X, groups)
    if grad_hidden_XF.numel():
        # Each tile sums the gradient of gates_X over its own features: atomic additions have no fixed order.
        sums = None if gates_X is None else grad_gates.new_empty(rows, width // BLOCK)
        arguments = [
            kept_XG2,
            kept_scales,
            grad_hidden_XF,
            None if gates_X is None else gates_X.contiguous(),
            None if ends_E is None else triton.find_rows_of_blocks(ends_E, len(hidden_by_columns[1])),
            *by_rows,
            *by_columns,
            *hidden_by_columns,
            sums,
        ]
        _launch("fp8_swiglu_backward", grad_hidden_XF, rows, hidden_by_columns[0], power_of_two, arguments)
        if sums is not None:
            grad_gates = sums.sum(1)
    return *by_rows, *by_columns, *hidden_by_columns, grad_gates


fake_of(_swiglu_backward)(triton.empty_for_gradients)


# Launching


def _fits(x_XD: Tensor) -> bool:
    """Whether a kernel can read these rows in pieces of 16 bytes."""
    pieces = x_XD.shape[1] % _PIECE == 0 and x_XD.stride(0) % _PIECE == 0 and x_XD.data_ptr() % 16 == 0
    return x_XD.dtype == torch.bfloat16 and x_XD.stride(1) == 1 and pieces


class _Sizes(ctypes.Structure):
    """The kernels' `Sizes`."""

    _fields_ = [("stride", ctypes.c_uint)] + [
        (name, ctypes.c_int) for name in ("rows", "width", "places", "power_of_two")
    ]


def _launch(
    name: str, x_XD: Tensor, rows: int, values_DP: Tensor, power_of_two: bool, arguments: Sequence[Tensor | None]
) -> None:
    """One thread block for each tile of the columns of `rows` rows, which have the width and stride of `x_XD`."""
    width, places = x_XD.shape[1], values_DP.shape[1]
    sizes = _Sizes(x_XD.stride(0) * x_XD.element_size(), rows, width, places, power_of_two)
    with current_device(x_XD.device):
        _kernel(name).launch(places // BLOCK * -(-width // BLOCK), _THREADS, [*arguments, sizes])


def kernels() -> Iterator[Kernel]:
    """Every kernel that these functions may launch."""
    return map(_kernel, _SHARED_BYTES)


@cache
def _kernel(name: str) -> Kernel:
    return Kernel(_SOURCE, name, {}, _SHARED_BYTES[name])

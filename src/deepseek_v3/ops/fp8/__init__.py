"""Matrices in 8-bit floating point (e4m3) with one scale per block."""

from deepseek_v3.ops.fp8.formats import (
    BLOCK,
    E4M3,
    ColumnBlocks,
    RowBlocks,
    WeightBlocks,
    group_starts,
    padded_places,
)
from deepseek_v3.ops.fp8.reference import (
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x128,
)

__all__ = [
    "BLOCK",
    "E4M3",
    "ColumnBlocks",
    "RowBlocks",
    "WeightBlocks",
    "dequantize_1x128",
    "dequantize_128x128",
    "group_starts",
    "padded_places",
    "quantize_1x128",
    "quantize_128x128",
]

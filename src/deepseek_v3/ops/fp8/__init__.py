"""Numbers of 8 bits with scales."""

from deepseek_v3.ops.fp8.reference import (
    BLOCK,
    E4M3,
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
)

__all__ = ["BLOCK", "E4M3", "dequantize_1x128", "dequantize_128x128", "quantize_1x128"]

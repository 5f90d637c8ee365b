"""Numbers of 8 bits with scales."""

from deepseek_v3.ops.fp8.reference import BLOCK, dequantize_1x128, quantize_1x128

__all__ = ["BLOCK", "dequantize_1x128", "quantize_1x128"]

"""Rotary position embedding."""

from deepseek_v3.ops.rotary.reference import rotate

__all__ = ["rotate"]

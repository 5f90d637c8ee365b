"""The gated activation of dense layers and experts."""

from deepseek_v3.ops.swiglu.reference import swiglu

__all__ = ["swiglu"]

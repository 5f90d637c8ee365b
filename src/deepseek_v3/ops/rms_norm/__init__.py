"""Root-mean-square normalisation."""

from deepseek_v3.ops.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]

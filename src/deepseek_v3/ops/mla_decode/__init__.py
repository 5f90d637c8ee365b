"""Attention over the latent cache, without expanding it."""

from deepseek_v3.ops.mla_decode.reference import mla_decode

__all__ = ["mla_decode"]

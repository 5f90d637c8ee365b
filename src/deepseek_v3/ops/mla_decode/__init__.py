"""Attention over the latent cache, without expanding it to keys and values."""

from collections.abc import Callable

from torch import Tensor

from deepseek_v3.ops.mla_decode.reference import mla_decode
from deepseek_v3.ops.operation import Backend, Operation

MlaDecode = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]

__all__ = ["MLA_DECODE", "MlaDecode", "mla_decode"]

MLA_DECODE: Operation[MlaDecode] = Operation("mla_decode", Backend("reference", lambda: mla_decode))

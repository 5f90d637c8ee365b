"""The gated activation of dense layers and experts."""

from typing import Protocol

from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation
from deepseek_v3.ops.swiglu.reference import swiglu

__all__ = ["SWIGLU", "SwiGLU", "swiglu"]


class SwiGLU(Protocol):
    """The interface of a back end, as `reference.swiglu` defines it."""

    def __call__(self, gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor: ...


SWIGLU: Operation[SwiGLU] = Operation("swiglu", Backend("reference", lambda: swiglu))

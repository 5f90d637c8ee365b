"""Rotary position embedding."""

from collections.abc import Callable

from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation
from deepseek_v3.ops.rotary.reference import rotate

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = ["ROTARY", "Rotate", "rotate"]

ROTARY: Operation[Rotate] = Operation("rotary", Backend("reference", lambda: rotate))

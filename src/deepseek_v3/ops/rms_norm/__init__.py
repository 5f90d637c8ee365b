"""Root-mean-square normalisation."""

from collections.abc import Callable

from torch import Tensor

from deepseek_v3.ops.operation import Backend, Operation
from deepseek_v3.ops.rms_norm.reference import rms_norm

RmsNorm = Callable[[Tensor, Tensor, float], Tensor]

__all__ = ["RMS_NORM", "RmsNorm", "rms_norm"]

RMS_NORM: Operation[RmsNorm] = Operation("rms_norm", Backend("reference", lambda: rms_norm))

"""The loss of a linear head over a vocabulary."""

from collections.abc import Callable

from torch import Tensor

from deepseek_v3.ops.cross_entropy.chunked import linear_cross_entropy
from deepseek_v3.ops.cross_entropy.reference import IGNORED
from deepseek_v3.ops.cross_entropy.reference import linear_cross_entropy as reference_linear_cross_entropy
from deepseek_v3.ops.operation import Backend, Operation

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = [
    "CROSS_ENTROPY",
    "IGNORED",
    "LinearCrossEntropy",
    "linear_cross_entropy",
    "reference_linear_cross_entropy",
]

CROSS_ENTROPY: Operation[LinearCrossEntropy] = Operation(
    "cross_entropy",
    Backend("chunked", lambda: linear_cross_entropy),
    Backend("reference", lambda: reference_linear_cross_entropy),
)

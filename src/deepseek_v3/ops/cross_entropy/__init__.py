"""The loss of a linear head over a vocabulary."""

from deepseek_v3.ops.cross_entropy.chunked import linear_cross_entropy
from deepseek_v3.ops.cross_entropy.reference import IGNORED
from deepseek_v3.ops.cross_entropy.reference import linear_cross_entropy as reference_linear_cross_entropy

__all__ = ["IGNORED", "linear_cross_entropy", "reference_linear_cross_entropy"]

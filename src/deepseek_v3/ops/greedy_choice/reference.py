"""The most probable token of each row of logits, in plain torch.

Axes: B rows, V vocabulary.
"""

from torch import Tensor


def greedy_choice(logits_BV: Tensor) -> Tensor:
    """The lowest of the ids with the largest logit of each row, (B,) int64; -1 for a row that is not finite."""
    is_finite_B = (logits_BV - logits_BV).sum(-1) == 0  # the difference is NaN for NaN and infinity, and 0 else
    return logits_BV.argmax(-1).masked_fill(~is_finite_B, -1)

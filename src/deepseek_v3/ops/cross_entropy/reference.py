"""The loss of a linear head over a vocabulary, in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32

IGNORED = -100  # a target of this value gives its token no loss and no gradient


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden · weightᵀ)[target], in nats; a scalar, float32 or float64.

    `targets_T` int64; tokens whose target is `IGNORED` add nothing. Logits have the type of `hidden_TD`; softmax
    and sum are computed in float32 at least.
    """
    logits_TV = F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype))
    return F.cross_entropy(at_least_float32(logits_TV), targets_T, reduction="sum", ignore_index=IGNORED)

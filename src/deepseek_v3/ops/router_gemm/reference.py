"""The product of the router, in plain torch.

Axes: T tokens, D model width, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32

# Below this logit, sigmoid equals exp to 27 digits. In float32 it loses digits from -87 on, and is 0 from -89 on.
_LEAST_BEST_LOGIT = -64.0


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x · weightᵀ, (T, E), computed and returned in float32, in float64 for float64; inputs of any float types."""
    x_TD = at_least_float32(x_TD)
    return F.linear(x_TD, weight_ED.to(x_TD.dtype))


def raised_logits(logits_TE: Tensor) -> Tensor:
    """The logits, such that their sigmoid does not underflow to 0 for all experts of a token.

    If the best logit of a token is below `_LEAST_BEST_LOGIT`, the same amount is added to all of its logits,
    which keeps the ratios of its scores.
    """
    best_T1 = logits_TE.detach().amax(-1, keepdim=True)
    raised_TE = logits_TE - best_T1 + _LEAST_BEST_LOGIT
    return torch.where(best_T1 < _LEAST_BEST_LOGIT, raised_TE, logits_TE)

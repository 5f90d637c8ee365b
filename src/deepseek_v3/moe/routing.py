"""Choosing experts (DeepSeek-V3 report, §2.1.2, eq. 12-16, with the group limit of the released model).

Axes: B batch, S sequence, T = B·S tokens, D model width, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.ops.dtypes import at_least_float32

# A group is worth the sum of its best two experts, as in the released gate.
_EXPERTS_THAT_SCORE_A_GROUP = 2

# Below it sigmoid equals exp to 27 digits. In float32 it loses digits from -87 on, and is 0 from -89 on.
_LEAST_BEST_LOGIT = -64.0


class Routing(NamedTuple):
    """The choice for each token: `gates_TK` float32, `experts_TK` int64, and all `scores_TE` float32.

    At least one score of a token is above 1e-28 if its logits are finite.
    """

    gates_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Chooses K of E experts for each token.

    The bias steers the choice alone; the gate values come from the unbiased scores. It is a buffer, moved by
    `balance.update_biases` once per optimizer step, not by a gradient.

    Weight and bias stay float32 (or float64) when the model is built in, converted to or loaded from a narrower
    type: rounding them to bfloat16 sends tokens to other experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dtype = _wide(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes (T, D) tokens of any float type; scores are taken in float32 (float64 for float64)."""
        x_TD = at_least_float32(x_TD)
        scores_TE = _scores(F.linear(x_TD, self.weight.to(x_TD.dtype)))
        experts_TK = self._choose(scores_TE.detach() + self.e_score_correction_bias)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            # The constant is the released gate's: far below it a token's gates are 0.
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(gates_TK * self.config.routed_scaling_factor, experts_TK, scores_TE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Converts and moves as any module does, but never to less than float32."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            dtype = _wide(converted.dtype)
            return converted if converted.dtype == dtype else tensor.to(converted.device, dtype)

        return super()._apply(convert, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Widens narrower tensors first: with `assign=True` they take the place of the router's own."""
        for name in ("weight", "e_score_correction_bias"):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                state_dict[prefix + name] = loaded.to(_wide(loaded.dtype))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _choose(self, biased_TE: Tensor) -> Tensor:
        """The K best experts inside the best groups; experts of losing groups can never win."""
        groups, kept = self.config.n_group, self.config.topk_group
        if kept < groups:
            biased_TGE = biased_TE.unflatten(-1, (groups, -1))
            worth_TG = biased_TGE.topk(_EXPERTS_THAT_SCORE_A_GROUP, dim=-1).values.sum(-1)
            winners = worth_TG.topk(kept, dim=-1).indices
            loses_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter(1, winners, False)
            biased_TE = biased_TGE.masked_fill(loses_TG.unsqueeze(-1), float("-inf")).flatten(-2)
        return biased_TE.topk(self.config.num_experts_per_tok, dim=-1).indices


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type itself, or float32 where it is a narrower float."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _scores(logits_TE: Tensor) -> Tensor:
    """Sigmoid of the logits, which never is 0 for all experts of a token: their ratios hold at any size.

    Where the best logit of a token is too low for that, all of its logits are raised by the same amount.
    """
    best_T1 = logits_TE.detach().amax(-1, keepdim=True)
    raised_TE = logits_TE - best_T1 + _LEAST_BEST_LOGIT
    return torch.sigmoid(torch.where(best_T1 < _LEAST_BEST_LOGIT, raised_TE, logits_TE))

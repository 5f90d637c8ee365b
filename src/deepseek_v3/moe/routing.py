"""Choosing experts (DeepSeek-V3 report, §2.1.2, eq. 12-16, with the group limit of the released model).

Axes: B batch, S sequence, T = B·S tokens, D model width, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.ops.dtypes import at_least_float32

# A group is worth the sum of its best two experts, as in the released gate.
_EXPERTS_THAT_SCORE_A_GROUP = 2


class Routing(NamedTuple):
    """The choice for each token: `gates_TK` float32, `experts_TK` int64, and all `scores_TE` float32."""

    gates_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Chooses K of E experts for each token.

    The bias steers the choice alone; the gate values come from the unbiased scores. It is a buffer, moved by
    `balance.update_biases` once per optimizer step, not by a gradient.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes (T, D) tokens of any float type; scores are taken in float32 (float64 for float64)."""
        x_TD = at_least_float32(x_TD)
        scores_TE = torch.sigmoid(F.linear(x_TD, self.weight.to(x_TD.dtype)))
        experts_TK = self._choose(scores_TE.detach() + self.e_score_correction_bias)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(gates_TK * self.config.routed_scaling_factor, experts_TK, scores_TE)

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

"""Choosing experts (DeepSeek-V3 report, §2.1.2, eq. 12-16, with the group limit of the released model).

Axes: B batch, S sequence, T = B·S tokens, D model width, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.ops.operation import Select
from deepseek_v3.ops.router_gemm import ROUTER_GEMM, RouterLogits, raised_logits, reference_router_logits
from deepseek_v3.ops.top_k import TOP_K, TopK, top_k

# The score of a group is the sum of its best two experts, as in the released gate.
_EXPERTS_PER_GROUP_SCORE = 2


class Routing(NamedTuple):
    """The chosen experts of each token: `experts_TK` int64, `gates_TK` float32, and all `scores_TE` float32.

    If the logits of a token are finite, at least one of its scores is above 1e-28.
    """

    gates_TK: Tensor
    experts_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Chooses K of E experts for each token (eq. 12-16).

    The bias steers the choice alone; the gate values come from the unbiased scores. It is a buffer that
    `balance.update_biases` moves once per optimizer step; it has no gradient.

    Weight and bias stay float32 (or float64) when the model is built in, converted to, or loaded from a narrower
    type, because rounding them to bfloat16 changes which experts are chosen.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dtype = _wide(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=dtype))
        self.logits: RouterLogits = reference_router_logits
        self.top_k: TopK = top_k

    def select_backends(self, select: Select) -> None:
        self.logits = select(ROUTER_GEMM, self.config.hidden_size)
        self.top_k = select(TOP_K, self.config.n_routed_experts)

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes tokens (T, D) of any float type; computes scores in float32 (float64 for float64)."""
        return self.route(torch.sigmoid(raised_logits(self.logits(x_TD, self.weight))))

    def route(self, scores_TE: Tensor) -> Routing:
        """Chooses experts by their scores, the sigmoid of raised logits."""
        experts_TK = self._choose(scores_TE.detach() + self.e_score_correction_bias)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            # The constant of the released gate. If the scores sum to far less, the gates of a token are almost 0.
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(gates_TK * self.config.routed_scaling_factor, experts_TK, scores_TE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Converts and moves tensors as any module does, but never to a type narrower than float32."""

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            dtype = _wide(converted.dtype)
            return converted if converted.dtype == dtype else tensor.to(converted.device, dtype)

        return super()._apply(convert, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Widens narrower tensors first, because with `assign=True` they replace the router's own."""
        for name in ("weight", "e_score_correction_bias"):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                state_dict[prefix + name] = loaded.to(_wide(loaded.dtype))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _choose(self, biased_TE: Tensor) -> Tensor:
        """The K best experts of the best groups; experts of the other groups are never chosen."""
        groups, kept = self.config.n_group, self.config.topk_group
        if kept < groups:
            biased_TGE = biased_TE.unflatten(-1, (groups, -1))
            best_of_group = self.top_k(biased_TGE.flatten(0, 1), _EXPERTS_PER_GROUP_SCORE)
            group_scores_TG = biased_TGE.gather(-1, best_of_group.unflatten(0, (-1, groups))).sum(-1)
            best_groups = self.top_k(group_scores_TG, kept)
            excluded_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, best_groups, False)
            biased_TE = biased_TGE.masked_fill(excluded_TG.unsqueeze(-1), float("-inf")).flatten(-2)
        return self.top_k(biased_TE, self.config.num_experts_per_tok)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a narrower float type."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype

"""Which ranks, nodes and experts tokens go to.

Axes: T tokens, K experts per token, E experts, W ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What DeepEP's `get_dispatch_layout` reports: counts int64, and whether a token goes to a rank.

    A token that chose several experts of one rank, or of one node, counts once there.
    """

    tokens_per_expert_E: Tensor
    is_token_in_rank_TW: Tensor
    ranks_per_node: int

    @property
    def tokens_per_rank_W(self) -> Tensor:
        return self.is_token_in_rank_TW.sum(0)

    @property
    def is_token_in_node_TN(self) -> Tensor:
        return self.is_token_in_rank_TW.unflatten(1, (-1, self.ranks_per_node)).any(-1)

    @property
    def tokens_per_node_N(self) -> Tensor:
        return self.is_token_in_node_TN.sum(0)


def dispatch_layout(experts_TK: Tensor, num_experts: int, ranks: int, ranks_per_node: int | None = None) -> Layout:
    """The layout of tokens by the experts (T, K) int64 that they chose; all on the tensor's own device.

    Rank r holds the experts from r·E/W to (r+1)·E/W; `ranks_per_node` consecutive ranks are a node, by default
    all.
    """
    chosen = experts_TK.flatten()
    tokens_per_expert_E = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    tokens_per_expert_E.scatter_add_(0, chosen, torch.ones_like(chosen))
    is_token_in_rank_TW = torch.zeros(len(experts_TK), ranks, dtype=torch.bool, device=chosen.device)
    is_token_in_rank_TW.scatter_(1, experts_TK // (num_experts // ranks), True)
    return Layout(tokens_per_expert_E, is_token_in_rank_TW, ranks_per_node or ranks)

"""A mixture-of-experts layer (DeepSeek-V3 report, §2.1.2, eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.balance import RoutingStats, sequence_balance_loss
from deepseek_v3.moe.dispatch import Dispatcher, LocalDispatcher
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.moe.routing import Router


class MixtureOfExperts(nn.Module):
    """Routed experts chosen per token, plus shared experts that see every token.

    The released weights hold the shared experts as one network of their joint width.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)
        if config.n_shared_experts:
            self.shared_experts = FeedForward(
                config.hidden_size, config.n_shared_experts * config.moe_intermediate_size
            )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStats]:
        """(B, S, D) to the layer's output of the same shape and type, and what its router did."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.gate(x_TD)
        y_BSD = self.dispatcher(x_TD, routing.gates_TK, routing.experts_TK, self.experts).view_as(x_BSD)
        if self.config.n_shared_experts:
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        experts_E = torch.arange(self.config.n_routed_experts, device=x_BSD.device)
        counts_E = (routing.experts_TK.flatten()[:, None] == experts_E).sum(0)
        balance_loss = sequence_balance_loss(routing.scores_TE, x_BSD.shape[0], self.config.num_experts_per_tok)
        return y_BSD, RoutingStats(counts_E, balance_loss)

"""A mixture-of-experts layer (DeepSeek-V3 report, §2.1.2, eq. 12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.balance import RoutingStats, sequence_balance_loss
from deepseek_v3.moe.dispatch import Dispatcher, LocalDispatcher
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.moe.routing import Router, Routing


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
        routing, stats = self.route(x_BSD)
        return self._mixed(x_BSD, routing), stats

    def route(self, x_BSD: Tensor) -> tuple[Routing, RoutingStats]:
        """Which experts take each token, and how that loads and balances them."""
        routing = self.gate(x_BSD.flatten(0, 1))
        experts_E = torch.arange(self.config.n_routed_experts, device=x_BSD.device)
        counts_E = (routing.experts_TK.flatten()[:, None] == experts_E).sum(0)
        balance_loss = sequence_balance_loss(routing.scores_TE, x_BSD.shape[0], self.config.num_experts_per_tok)
        return routing, RoutingStats(counts_E, balance_loss)

    def _mixed(self, x_BSD: Tensor, routing: Routing) -> Tensor:
        """Routed and shared experts; the shared ones compute while rows travel to the others and back."""
        shared = self.shared_experts if self.config.n_shared_experts else None
        sent = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing.gates_TK, routing.experts_TK)
        hidden_BSF = shared.hidden(x_BSD) if shared else None
        arrived = self.dispatcher.receive(sent)
        rows_XD = self.experts(arrived.rows_XD, arrived.gates_X, arrived.ends_E)
        returned = self.dispatcher.combine(rows_XD, arrived.handle)
        shared_BSD = shared.down_proj(hidden_BSF) if shared else None
        y_BSD = self.dispatcher.collect(returned).view_as(x_BSD)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD

"""A mixture-of-experts layer (DeepSeek-V3 report, §2.1.2, eq. 12).

Axes: B batch, S sequence, T = B·S tokens, R received tokens, D model width, E experts, K experts per token, F
hidden width of the shared experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.balance import RoutingStats, sequence_balance_loss
from deepseek_v3.moe.dispatch import Dispatcher, LocalDispatcher
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.moe.routing import Router, Routing


class MixtureOfExperts(nn.Module):
    """Routed experts, K of them per token, plus shared experts that see every token.

    As in the released weights, the shared experts are one network whose hidden width is the sum of theirs.
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
        """Returns the layer's output, in the shape (B, S, D) and type of `x_BSD`, and statistics of its router."""
        routing, stats = self.route(x_BSD)
        return self.run_experts(x_BSD, routing.gates_TK, routing.experts_TK), stats

    def route(self, x_BSD: Tensor) -> tuple[Routing, RoutingStats]:
        """Chooses the experts of each token, and counts and balances the load that this makes."""
        routing = self.gate(x_BSD.flatten(0, 1))
        experts_E = torch.arange(self.config.n_routed_experts, device=x_BSD.device)
        counts_E = (routing.experts_TK.flatten()[:, None] == experts_E).sum(0)
        balance_loss = sequence_balance_loss(
            routing.scores_TE, x_BSD.shape[0], self.config.num_experts_per_tok, self.gate.top_k
        )
        return routing, RoutingStats(counts_E, balance_loss)

    def run_experts(self, x_BSD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The sum of routed and shared experts; the shared ones run while tokens are dispatched and combined."""
        shared = self.shared_experts if self.config.n_shared_experts else None
        sent = self.dispatcher.dispatch(x_BSD.flatten(0, 1), gates_TK, experts_TK)
        hidden = shared.hidden(x_BSD) if shared else None
        *received, handle = self.dispatcher.wait_dispatch(sent)
        returned = self.dispatcher.combine(self.experts(*received), handle)
        shared_BSD = shared.output(hidden) if shared else None
        y_BSD = self.dispatcher.wait_combine(returned).view_as(x_BSD)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD

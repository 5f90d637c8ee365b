"""The training objective (DeepSeek-V3 report, eq. 17, 24 and 25)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.model.transformer import DeepSeekV3, HiddenStates
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.cross_entropy import linear_cross_entropy


class Losses(NamedTuple):
    """Losses of one micro-batch, 0-d float32, in nats per token; `counts_LE` int64 loads of each mixture layer.

    `total` = main + λ · prediction + α · balance. `prediction` is the mean over depths, `balance` the sum over
    layers; both are zero, and `counts_LE` has no rows, where the model has no such part.
    """

    total: Tensor
    main: Tensor
    prediction: Tensor
    balance: Tensor
    counts_LE: Tensor


class Objective(nn.Module):
    """A model with its losses: one forward call makes them all, as wrappers of modules expect it."""

    def __init__(self, model: DeepSeekV3) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens_BX: Tensor,
        prediction_weight: float,
        balance_weight: float,
        documents_BS: Tensor | None = None,
        predict: bool = True,
    ) -> Losses:
        """Losses of S inputs and their targets, given as `tokens_BX` int64 with X = S + 1."""
        states = self.model.hidden_states(tokens_BX[:, :-1], documents_BS, predict)
        return losses_of(self.model, states, tokens_BX, prediction_weight, balance_weight)


def training_losses(
    model: DeepSeekV3,
    tokens_BX: Tensor,
    prediction_weight: float,
    balance_weight: float,
    documents_BS: Tensor | None = None,
) -> Losses:
    """As `Objective` makes them."""
    return Objective(model)(tokens_BX, prediction_weight, balance_weight, documents_BS)


def losses_of(
    model: DeepSeekV3, states: HiddenStates, tokens_BX: Tensor, prediction_weight: float, balance_weight: float
) -> Losses:
    """Losses of the states that `tokens_BX` led to."""
    num_tokens = tokens_BX[:, 1:].numel()
    main = next_token_loss(model, states.main_BSD, tokens_BX[:, 1:]) / num_tokens
    zero = torch.zeros_like(main)
    # Depth k predicts token i + k + 1 from position i; as in eq. 24 its sum is divided by the full length.
    depths = [
        next_token_loss(model, hidden_BSD, tokens_BX[:, depth + 1 :]) / num_tokens
        for depth, hidden_BSD in enumerate(states.predictions, start=1)
    ]
    prediction = torch.stack(depths).mean() if depths else zero
    balance = sum_of_balance(states.routing, zero)
    return Losses(
        total=main + prediction_weight * prediction + balance_weight * balance,
        main=main.detach(),
        prediction=prediction.detach(),
        balance=balance.detach(),
        counts_LE=stacked_counts(states.routing, model.config.n_routed_experts, tokens_BX.device),
    )


def sum_of_balance(routing: Sequence[RoutingStats], zero: Tensor) -> Tensor:
    """The balance losses of all these layers together, 0-d; `zero` where there are none."""
    return torch.stack([stats.balance_loss for stats in routing]).sum() if routing else zero


def stacked_counts(routing: Sequence[RoutingStats], num_experts: int, device: torch.device) -> Tensor:
    """Loads of these layers' experts: int64 (layers, experts)."""
    counts = [stats.counts_E for stats in routing]
    return torch.stack(counts) if counts else torch.zeros(0, num_experts, dtype=torch.int64, device=device)


def next_token_loss(model: DeepSeekV3, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Summed cross-entropy of the shared head on states `hidden_BSD`; 0-d, nats."""
    return linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head_weight_VD, targets_BS.flatten())

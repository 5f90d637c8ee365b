"""The training objective (DeepSeek-V3 report, eq. 17, 24 and 25)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.model.transformer import DeepSeekV3, HiddenStates
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.cross_entropy import IGNORED


class Losses(NamedTuple):
    """Losses of one micro-batch, 0-d float32, in nats per token; `counts_LE` int64 loads of each mixture layer.

    `total` = main + λ · mtp + α · balance. `mtp` is the mean over depths, `balance` the sum over
    layers; both are zero, and `counts_LE` has no rows, where the model has no such part.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
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
        mtp_weight: float,
        balance_weight: float,
        documents_BX: Tensor | None = None,
        with_mtp: bool = True,
        num_targets: Tensor | int | None = None,
    ) -> Losses:
        """Losses of S inputs and their targets, given as `tokens_BX` int64 with X = S + 1.

        `documents_BX` int64 numbers the document of each token: attention and targets then stay inside a document.
        `num_targets` as in `compute_losses`.
        """
        documents_BS = None if documents_BX is None else documents_BX[:, :-1]
        states = self.model.hidden_states(tokens_BX[:, :-1], documents_BS, with_mtp)
        return compute_losses(self.model, states, tokens_BX, mtp_weight, balance_weight, documents_BX, num_targets)


def training_losses(
    model: DeepSeekV3,
    tokens_BX: Tensor,
    mtp_weight: float,
    balance_weight: float,
    documents_BX: Tensor | None = None,
) -> Losses:
    """As `Objective` makes them."""
    return Objective(model)(tokens_BX, mtp_weight, balance_weight, documents_BX)


def compute_losses(
    model: DeepSeekV3,
    states: HiddenStates,
    tokens_BX: Tensor,
    mtp_weight: float,
    balance_weight: float,
    documents_BX: Tensor | None = None,
    num_targets: Tensor | int | None = None,
) -> Losses:
    """Losses of the states that `tokens_BX` led to.

    With `documents_BX` a target counts only where it belongs to the document of its position. As in eq. 24 the sum
    of every depth is divided by the number of the main model's targets: `num_targets`, or those of `tokens_BX` that
    count. Where several micro-batches make a batch, give the mean number of one, so that the mean of their losses
    is the mean over all targets of the batch.
    """
    if num_targets is None:
        num_targets = tokens_BX[:, 1:].numel() if documents_BX is None else count_targets(documents_BX).clamp(min=1)
    if isinstance(num_targets, Tensor):
        num_targets = num_targets.to(torch.promote_types(states.main_BSD.dtype, torch.float32))

    def loss(hidden_BSD: Tensor, depth: int) -> Tensor:
        summed = next_token_loss(model, hidden_BSD, _targets(tokens_BX, documents_BX, depth))
        return summed / num_targets

    main = loss(states.main_BSD, depth=0)
    zero = torch.zeros_like(main)
    depths = [loss(hidden_BSD, depth) for depth, hidden_BSD in enumerate(states.mtp, start=1)]
    mtp = torch.stack(depths).mean() if depths else zero
    balance = sum_balance_losses(states.routing, zero)
    return Losses(
        total=main + mtp_weight * mtp + balance_weight * balance,
        main=main.detach(),
        mtp=mtp.detach(),
        balance=balance.detach(),
        counts_LE=stack_expert_counts(states.routing, model.config.n_routed_experts, tokens_BX.device),
    )


def count_targets(documents_BX: Tensor) -> Tensor:
    """How many targets of the main model belong to the document of the token before them; int64, 0-d."""
    return (documents_BX[:, 1:] == documents_BX[:, :-1]).sum()


def _targets(tokens_BX: Tensor, documents_BX: Tensor | None, depth: int) -> Tensor:
    """Token i + depth + 1 for each position i, `IGNORED` where it belongs to another document."""
    targets_BS = tokens_BX[:, depth + 1 :]
    if documents_BX is None:
        return targets_BS
    leaves_BS = documents_BX[:, depth + 1 :] != documents_BX[:, : -depth - 1]
    return targets_BS.masked_fill(leaves_BS, IGNORED)


def sum_balance_losses(routing: Sequence[RoutingStats], zero: Tensor) -> Tensor:
    """The balance losses of all these layers together, 0-d; `zero` where there are none."""
    return torch.stack([stats.balance_loss for stats in routing]).sum() if routing else zero


def stack_expert_counts(routing: Sequence[RoutingStats], num_experts: int, device: torch.device) -> Tensor:
    """Loads of these layers' experts: int64 (layers, experts)."""
    counts = [stats.counts_E for stats in routing]
    return torch.stack(counts) if counts else torch.zeros(0, num_experts, dtype=torch.int64, device=device)


def next_token_loss(model: DeepSeekV3, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Summed cross-entropy of the shared head on states `hidden_BSD`, `IGNORED` targets left out; 0-d, nats."""
    return model.linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head_weight_VD, targets_BS.flatten())

"""The training objective: main loss, multi-token prediction, load balance, and the loss terms of a config.

    total = main + λ · mtp + α · balance + Σ weight · term        (DeepSeek-V3 report, eq. 17, 24 and 25)

Axes: B batch, S sequence, X = S + 1 tokens, D width, L MoE layers, E experts, N loss terms of the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.model.transformer import DeepSeekV3, HiddenStates
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.cross_entropy import IGNORED
from deepseek_v3.training.loss_terms import LossInputs, LossTerm


class Losses(NamedTuple):
    """The losses of one micro-batch, 0-d, float32 unless the model is float64; cross-entropies in nats per token.

    `mtp`: the mean over prediction depths. `balance`: the sum over layers. `terms_N`: float32, before weighting.
    `counts_LE`: int64, the tokens that each expert of each layer received. A part that the model does not have
    is 0; without MoE layers `counts_LE` has no rows.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    terms_N: Tensor
    counts_LE: Tensor


class Objective(nn.Module):
    """A model with its losses, which one forward call computes, as wrappers such as FSDP expect."""

    def __init__(self, model: DeepSeekV3, loss_terms: Sequence[LossTerm] = ()) -> None:
        super().__init__()
        self.model = model
        self.loss_terms = tuple(loss_terms)

    def forward(
        self,
        tokens_BX: Tensor,
        mtp_weight: float,
        balance_weight: float,
        documents_BX: Tensor | None = None,
        main_only: bool = False,
        num_targets: Tensor | int | None = None,
    ) -> Losses:
        """Computes the losses of `tokens_BX`, int64: the first S tokens are inputs, the last S their targets.

        `documents_BX`, int64, are the tokens' document ids: attention and targets then stay inside a document.
        `main_only` skips multi-token prediction and loss terms. `num_targets`: see `compute_losses`.
        """
        documents_BS = None if documents_BX is None else documents_BX[:, :-1]
        states = self.model.hidden_states(tokens_BX[:, :-1], documents_BS, with_mtp=not main_only)
        terms = () if main_only else self.loss_terms
        weights = mtp_weight, balance_weight
        return compute_losses(self.model, states, tokens_BX, *weights, documents_BX, num_targets, terms)


def training_losses(
    model: DeepSeekV3,
    tokens_BX: Tensor,
    mtp_weight: float,
    balance_weight: float,
    documents_BX: Tensor | None = None,
) -> Losses:
    """Computes the losses of a model without additional loss terms, as `Objective.forward` does."""
    return Objective(model)(tokens_BX, mtp_weight, balance_weight, documents_BX)


def compute_losses(
    model: DeepSeekV3,
    states: HiddenStates,
    tokens_BX: Tensor,
    mtp_weight: float,
    balance_weight: float,
    documents_BX: Tensor | None = None,
    num_targets: Tensor | int | None = None,
    terms: Sequence[LossTerm] = (),
) -> Losses:
    """Computes the losses of the hidden states that a forward pass over `tokens_BX` returned.

    With `documents_BX` a target counts only if it belongs to the same document as the token before it. As in
    eq. 24, the sums of every depth and of every loss term are divided by the number of targets of the main model:
    `num_targets`, by default the number in `tokens_BX`. For gradient accumulation, pass the mean number of targets
    per micro-batch; the mean of the micro-batches' losses is then the mean over all targets of the batch.
    """
    if num_targets is None:
        num_targets = tokens_BX[:, 1:].numel() if documents_BX is None else count_targets(documents_BX).clamp(min=1)
    if isinstance(num_targets, Tensor):
        num_targets = num_targets.to(torch.promote_types(states.main_BSD.dtype, torch.float32))

    def loss(hidden_BSD: Tensor, depth: int) -> Tensor:
        return next_token_loss(model, hidden_BSD, targets_at(tokens_BX, documents_BX, depth)) / num_targets

    main = loss(states.main_BSD, depth=0)
    zero = torch.zeros_like(main)
    depths = [loss(hidden_BSD, depth) for depth, hidden_BSD in enumerate(states.mtp, start=1)]
    mtp = torch.stack(depths).mean() if depths else zero
    balance = sum_balance_losses(states.routing, zero)
    total = main + mtp_weight * mtp + balance_weight * balance
    terms_N = main.new_zeros(len(terms))
    if terms:
        targets_BS = targets_at(tokens_BX, documents_BX, depth=0)
        inputs = LossInputs(states.main_BSD, targets_BS, model.head_weight_VD, model.config)
        terms_N = torch.stack([term.function(inputs).to(main.dtype) / num_targets for term in terms])
        total = total + (terms_N * terms_N.new_tensor([term.weight for term in terms])).sum()
    return Losses(
        total=total,
        main=main.detach(),
        mtp=mtp.detach(),
        balance=balance.detach(),
        terms_N=terms_N.detach(),
        counts_LE=stack_expert_counts(states.routing, model.config.n_routed_experts, tokens_BX.device),
    )


def count_targets(documents_BX: Tensor) -> Tensor:
    """The number of main-model targets that belong to the document of the token before them; int64, 0-d."""
    return (documents_BX[:, 1:] == documents_BX[:, :-1]).sum()


def targets_at(tokens_BX: Tensor, documents_BX: Tensor | None, depth: int) -> Tensor:
    """Returns token i + depth + 1 for each position i, IGNORED if it is in another document; (B, S - depth)."""
    targets_BS = tokens_BX[:, depth + 1 :]
    if documents_BX is None:
        return targets_BS
    leaves_BS = documents_BX[:, depth + 1 :] != documents_BX[:, : -depth - 1]
    return targets_BS.masked_fill(leaves_BS, IGNORED)


def sum_balance_losses(routing: Sequence[RoutingStats], zero: Tensor) -> Tensor:
    """The sum of the layers' balance losses, 0-d; `zero` if there are no MoE layers."""
    return torch.stack([stats.balance_loss for stats in routing]).sum() if routing else zero


def stack_expert_counts(routing: Sequence[RoutingStats], num_experts: int, device: torch.device) -> Tensor:
    """The number of tokens that each expert of each MoE layer received: int64 (layers, experts)."""
    counts = [stats.counts_E for stats in routing]
    return torch.stack(counts) if counts else torch.zeros(0, num_experts, dtype=torch.int64, device=device)


def next_token_loss(model: DeepSeekV3, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """The summed cross-entropy of the shared head on `hidden_BSD` over targets that are not IGNORED; 0-d, nats."""
    return model.linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head_weight_VD, targets_BS.flatten())

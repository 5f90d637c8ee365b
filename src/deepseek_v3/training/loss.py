"""The training objective: main loss, multi-token prediction, load balance, and the loss terms of a config.

    total = main + λ · mtp + α · balance + Σ weight · term        (DeepSeek-V3 report, eq. 17, 24 and 25)

Evaluations also count the drafts of multi-token prediction that generation would accept.

Axes: B batch, S sequence, X = S + 1 tokens, D width, L MoE layers, E experts, N loss terms of the config, K depths
of multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.model.transformer import DeepSeekV3, HiddenStates
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.cross_entropy import IGNORED, linear_argmax
from deepseek_v3.training.loss_terms import LossInputs, LossTerm


class Losses(NamedTuple):
    """The losses of one micro-batch, 0-d, float32 unless the model is float64; cross-entropies in nats per token.

    `mtp`: the mean over prediction depths. `balance`: the sum over layers. `terms_N`: float32, before weighting.
    `counts_LE`: int64, the tokens that each expert of each layer received. A part that the model does not have
    is 0; without MoE layers `counts_LE` has no rows. `drafts_BK2`: those of `count_drafts`, only in an evaluation
    that asks for them.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    terms_N: Tensor
    counts_LE: Tensor
    drafts_BK2: Tensor | None = None


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
        with_drafts: bool = False,
    ) -> Losses:
        """Computes the losses of `tokens_BX`, int64: the first S tokens are inputs, the last S their targets.

        `documents_BX`, int64, are the tokens' document ids: attention and targets then stay inside a document.
        The other arguments are those of `compute_losses`. The MTP layers run if their losses or drafts need them.
        """
        documents_BS = None if documents_BX is None else documents_BX[:, :-1]
        with_mtp = with_drafts or not main_only
        states = self.model.hidden_states(tokens_BX[:, :-1], documents_BS, with_mtp)
        return compute_losses(
            self.model,
            states,
            tokens_BX,
            mtp_weight,
            balance_weight,
            documents_BX,
            num_targets,
            self.loss_terms,
            main_only=main_only,
            with_drafts=with_drafts,
        )


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
    *,
    main_only: bool = False,
    with_drafts: bool = False,
) -> Losses:
    """Computes the losses of the hidden states that a forward pass over `tokens_BX` returned.

    With `documents_BX` a target counts only if it belongs to the same document as the token before it. As in
    eq. 24, the sums of every depth and of every loss term are divided by the number of targets of the main model:
    `num_targets`, by default the number in `tokens_BX`. For gradient accumulation, pass the mean number of targets
    per micro-batch; the mean of the micro-batches' losses is then the mean over all targets of the batch.
    `main_only` skips the losses of multi-token prediction and the loss terms; `with_drafts` counts the drafts of
    the MTP layers (`count_drafts`), whose states must then be there.
    """
    if num_targets is None:
        num_targets = tokens_BX[:, 1:].numel() if documents_BX is None else count_targets(documents_BX).clamp(min=1)
    if isinstance(num_targets, Tensor):
        num_targets = num_targets.to(torch.promote_types(states.main_BSD.dtype, torch.float32))

    def loss(hidden_BSD: Tensor, depth: int) -> Tensor:
        return next_token_loss(model, hidden_BSD, targets_at(tokens_BX, documents_BX, depth)) / num_targets

    main = loss(states.main_BSD, depth=0)
    zero = torch.zeros_like(main)
    predictions, terms = ([], ()) if main_only else (states.mtp, terms)
    depths = [loss(hidden_BSD, depth) for depth, hidden_BSD in enumerate(predictions, start=1)]
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
        drafts_BK2=count_drafts(model, states, tokens_BX, documents_BX) if with_drafts else None,
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


@torch.no_grad()
def count_drafts(
    model: DeepSeekV3, states: HiddenStates, tokens_BX: Tensor, documents_BX: Tensor | None = None
) -> Tensor:
    """Counts drafts and accepted drafts in each sequence of `tokens_BX`, int64: int64 (B, K, 2).

    `states`: those of a forward pass over `tokens_BX` with its MTP layers. The draft of depth k at position i is
    the layer's most probable token i + k + 1. It is accepted if the main model, at position i + k, gives the same
    token the highest probability; of equally probable tokens, both take the lowest id. Every layer reads the true
    tokens (teacher forcing). As generation discards what follows a rejected draft, depth k > 1 makes a draft only
    where the drafts of all earlier depths at position i were accepted. With `documents_BX`, as in `compute_losses`,
    only drafts whose token i + k + 1 belongs to the document of position i count.
    """
    main_BS = _most_probable(model, states.main_BSD)
    length = main_BS.shape[1]
    accepted_BS = torch.ones_like(main_BS, dtype=torch.bool)
    counts_BK2 = main_BS.new_zeros(len(main_BS), len(states.mtp), 2)
    for depth, hidden_BSD in enumerate(states.mtp, start=1):
        is_target_BS = targets_at(tokens_BX, documents_BX, depth) != IGNORED
        drafted_BS = accepted_BS[:, : length - depth] & is_target_BS
        accepted_BS = drafted_BS & (_most_probable(model, hidden_BSD) == main_BS[:, depth:])
        counts_BK2[:, depth - 1, 0] = drafted_BS.sum(1)
        counts_BK2[:, depth - 1, 1] = accepted_BS.sum(1)
    return counts_BK2


def _most_probable(model: DeepSeekV3, hidden_BSD: Tensor) -> Tensor:
    """The most probable token of the shared head at each position: int64 (B, S)."""
    return linear_argmax(hidden_BSD.flatten(0, 1), model.head_weight_VD).view(hidden_BSD.shape[:2])

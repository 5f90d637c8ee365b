"""Choosing the experts of a few rows, in plain torch; the router of training, without its gradient.

Axes: M rows, E experts, G groups of them, K choices per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.router_gemm import raised_logits, reference_router_logits

router_logits = reference_router_logits


class Choices(NamedTuple):
    """How experts are chosen: `per_token` of them, from the best `kept_groups` of `groups` equal groups.

    Gates are normalised to a sum of 1 if `normalised`, and multiplied by `scaling`. Behind them every row has
    `shared` more choices, with gates of 1: the experts that follow the routed ones.
    """

    per_token: int
    groups: int
    kept_groups: int
    normalised: bool
    scaling: float
    shared: int = 0


class ChosenRows(NamedTuple):
    """Which choices are for each expert: number m·K + k is choice k of row m.

    `choices_EM` int32 lists those of an expert in ascending order, of which `counts_E` int32 are valid.
    """

    choices_EM: Tensor
    counts_E: Tensor


def choose(logits_ME: Tensor, bias_E: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
    """The gates (M, K) float32 and the experts (M, K) int32 of each row, as the router of training chooses them.

    Scores are the sigmoid of the logits, raised where all are very low. `bias_E` counts for the choice alone. The
    score of a group is that of its best two experts. Of equal scores the lowest expert comes first.
    """
    scores_ME = torch.sigmoid(raised_logits(logits_ME))
    biased_ME = scores_ME + bias_E
    if choices.kept_groups < choices.groups:
        biased_MGE = biased_ME.unflatten(-1, (choices.groups, -1))
        best_MG = biased_MGE.sort(dim=-1, descending=True, stable=True).values[..., :2].sum(-1)
        kept_MG = best_MG.sort(dim=-1, descending=True, stable=True).indices[:, : choices.kept_groups]
        is_left_out_MG = torch.ones_like(best_MG, dtype=torch.bool).scatter(1, kept_MG, False)
        biased_ME = biased_MGE.masked_fill(is_left_out_MG[..., None], float("-inf")).flatten(1)
    experts_MK = biased_ME.sort(dim=-1, descending=True, stable=True).indices[:, : choices.per_token]
    gates_MK = scores_ME.gather(1, experts_MK)
    if choices.normalised:
        gates_MK = gates_MK / (gates_MK.sum(-1, keepdim=True) + 1e-20)
    shared_E = torch.arange(scores_ME.shape[1], scores_ME.shape[1] + choices.shared, device=scores_ME.device)
    gates_MK = F.pad(gates_MK * choices.scaling, (0, choices.shared), value=1.0)
    return gates_MK, torch.cat((experts_MK, shared_E.expand(len(experts_MK), -1)), 1).int()


def rows_by_expert(experts_MK: Tensor, slots_M: Tensor, num_experts: int) -> ChosenRows:
    """The choices of each expert. Rows whose slot is negative are padding, and choose none."""
    numbers_E1 = torch.arange(num_experts, device=experts_MK.device)[:, None]
    chosen_EX = (experts_MK.flatten() == numbers_E1) & (slots_M >= 0).repeat_interleave(experts_MK.shape[1])
    order_EX = chosen_EX.int().sort(dim=-1, descending=True, stable=True).indices
    return ChosenRows(order_EX[:, : len(experts_MK)].int(), chosen_EX.sum(-1).int())

"""Keeping experts evenly loaded (DeepSeek-V3 report, §2.1.2).

There are two means: a bias on the choice of experts, which is moved against the load without a gradient, and a
small loss that keeps the tokens of one sequence from choosing few experts. Axes as in `routing.py`, and L layers.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.moe.routing import Router
from deepseek_v3.ops.top_k import TopK, top_k

_MEAN = 32  # in encoded loads, the byte of an expert with the mean load; 255 stands for 8 times as much
_LEAST_SUM = 1e-30  # of the scores of a token; the sums of the router's scores are larger


class RoutingStats(NamedTuple):
    """Statistics of one router in one forward pass.

    `counts_E` int64: the number of tokens that chose each expert. `balance_loss`: the sequence-wise loss without
    its factor α. They are outputs and not state, so recomputing a layer does not count a token twice.
    """

    counts_E: Tensor
    balance_loss: Tensor


def sequence_balance_loss(
    scores_TE: Tensor, batch_size: int, experts_per_token: int, top_k: TopK = top_k
) -> Tensor:
    """Eq. 17-20 without α, averaged over the sequences of the batch; a float32 scalar with a gradient.

    `scores_TE` (B·S, E): unbiased sigmoid scores. As in eq. 18, f counts an expert if it is among the K best by
    unbiased score, not by the biased, group-limited choice. A token whose scores are all 0 adds nothing.
    """
    scores_BSE = scores_TE.unflatten(0, (batch_size, -1))
    num_experts = scores_BSE.shape[-1]
    best_BSK = top_k(scores_TE, experts_per_token).unflatten(0, (batch_size, -1))
    is_best_BSE = torch.zeros_like(scores_BSE).scatter(-1, best_BSK, 1.0)
    f_BE = is_best_BSE.mean(1) * (num_experts / experts_per_token)
    p_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True).clamp(min=_LEAST_SUM)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


def routers_of(model: nn.Module) -> list[Router]:
    """Every router of a model in layer order, those of the MTP layers included."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def update_biases(routers: Sequence[Router], counts_LE: Tensor, speed: float | Tensor) -> None:
    """Moves every bias by γ = `speed`: down for experts above the mean load, up for experts below it.

    `counts_LE` (layers, E): tokens per expert over the whole global batch, one row per router in order.
    """
    # In integers, so that a load that differs from the mean by one token counts at any scale.
    below_mean_LE = counts_LE.sum(-1, keepdim=True) - counts_LE * counts_LE.shape[-1]
    steps_LE = speed * torch.sign(below_mean_LE)
    torch._foreach_add_([router.e_score_correction_bias for router in routers], list(steps_LE.unbind()))


def load_metrics(counts_LE: Tensor) -> dict[str, Tensor]:
    """How evenly each layer used its experts; every value has the shape (layers,) and is float32.

    `entropy`: the entropy of the load over its maximum ln E (1 is even); `utilisation`: the share of experts with
    any token; `max_violation`: the largest load over the mean load, minus 1 (arXiv:2408.15664, eq. 4).
    """
    counts_LE = counts_LE.float()
    share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
    return {
        "entropy": torch.special.entr(share_LE).sum(-1) / math.log(max(counts_LE.shape[-1], 2)),
        "utilisation": (counts_LE > 0).float().mean(-1),
        "max_violation": share_LE.amax(-1) * counts_LE.shape[-1] - 1,
    }


def encode_load(counts: Sequence[float], num_layers: int) -> str:
    """Encodes the tokens of each expert, layer after layer, relative to the mean of its layer: base64, a byte each.

    58 layers of 256 experts take 20 kB. An expert that received any token is at least 1, so only dead ones are 0.
    """
    counts_LE = torch.tensor(counts, dtype=torch.float64).view(num_layers, -1)
    relative_LE = counts_LE / counts_LE.mean(1, keepdim=True).clamp(min=1e-9) * _MEAN
    codes_LE = torch.where(counts_LE > 0, relative_LE.round().clamp(1, 255), 0.0)
    return b64encode(bytes(codes_LE.to(torch.uint8).flatten().tolist())).decode()


def decode_load(text: str, num_layers: int) -> list[list[float]]:
    """Returns the loads of `encode_load` over the mean of their layer, by layer and expert.

    Raises ValueError if the text is no such encoding.
    """
    codes = b64decode(text, validate=True)
    if not codes or len(codes) % num_layers:
        raise ValueError(f"{len(codes)} bytes for {num_layers} layers")
    size = len(codes) // num_layers
    return [[code / _MEAN for code in codes[start : start + size]] for start in range(0, len(codes), size)]

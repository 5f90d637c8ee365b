"""Published scaling laws: the expected loss of a run, and its suggested learning rate and batch.

N is parameters, D tokens, C = 6·N·D operations; losses are nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.planning.counts import count_active_parameters, count_parameters

SOURCE = (
    "loss: joint law of dense and MoE models, Ludziejewski et al. 2025 (arXiv:2502.05172), between dense laws at "
    "active and at total parameters, Besiroglu et al. 2024 (arXiv:2404.10102); "
    "learning rate and batch: DeepSeek LLM (arXiv:2401.02954), equation 1"
)

# Lowest and highest values of the runs on which the joint law was fitted (its appendix E).
_FITTED_ACTIVE = (79e6, 2.7e9)
_FITTED_TOTAL = (79e6, 5e9)
_FITTED_TOKENS = (0.5e9, 80e9)
_FITTED_EXPANSION = (1, 32)

# Standard error of the irreducible loss in the dense refit.
_STANDARD_ERROR = 0.03


@dataclass(frozen=True)
class ExpectedLoss:
    """A loss in nats per token with its error bar; `extrapolated` outside the joint law's fitted range."""

    value: float
    low: float
    high: float
    extrapolated: bool


def expected_loss(model: ModelConfig, tokens: float) -> ExpectedLoss:
    """The loss that the joint law predicts after `tokens` tokens, with its error bar.

    The bar spans the joint law, the dense law at the active parameters (as if the other experts did not exist) and
    at all parameters (as if each token used them), widened by the standard error of the dense law's constant.
    """
    active, total, experts = count_active_parameters(model), count_parameters(model).total, expansion(model)
    value = joint_loss(active, tokens, experts)
    estimates = (value, dense_loss(active, tokens), dense_loss(total, tokens))
    fitted = (
        (active, _FITTED_ACTIVE),
        (total, _FITTED_TOTAL),
        (tokens, _FITTED_TOKENS),
        (experts, _FITTED_EXPANSION),
    )
    return ExpectedLoss(
        value=value,
        low=min(estimates) - _STANDARD_ERROR,
        high=max(estimates) + _STANDARD_ERROR,
        extrapolated=not all(lowest <= figure <= highest for figure, (lowest, highest) in fitted),
    )


def expansion(model: ModelConfig) -> float:
    """E of the joint law: weights of all experts over weights of a token's experts; 1 for a dense model.

    In the law's models each expert is as wide as the dense layer that it replaces, and one is active. Here several
    narrower ones are active, so E is the ratio of their total widths.
    """
    if model.num_moe_layers == 0:
        return 1.0
    shared = model.n_shared_experts
    return (model.n_routed_experts + shared) / (model.num_experts_per_tok + shared)


def joint_loss(active: float, tokens: float, experts: float) -> float:
    """L = a·Ê^δ·N^(α+γ·ln Ê) + b·Ê^ω·D^(β+ζ·ln Ê) + c (arXiv:2502.05172, equations 4 and 6, table 3)."""
    e_start, e_max = 2.0732, 290.4521
    e_hat = 1 / (1 / (experts - 1 + 1 / (1 / e_start - 1 / e_max)) + 1 / e_max)
    of_model = 35.91 * e_hat**-0.2285 * active ** (-0.1889 + 0.0098 * math.log(e_hat))
    of_tokens = 35.98 * e_hat**0.5529 * tokens ** (-0.1775 - 0.0259 * math.log(e_hat))
    return of_model + of_tokens + 1.3637


def dense_loss(parameters: float, tokens: float) -> float:
    """L = E + A/N^α + B/D^β with the refitted coefficients (arXiv:2404.10102)."""
    return 1.8172 + 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658


def training_compute(model: ModelConfig, tokens: float) -> float:
    """C = 6 × active parameters × tokens, with the output head.

    The laws below were fitted on non-embedding operations, without the head and with attention scores.
    """
    return 6.0 * count_active_parameters(model) * tokens


def suggested_learning_rate(compute: float) -> float:
    """η = 0.3118·C^−0.1250, the highest learning rate of a run (arXiv:2401.02954, equation 1)."""
    return 0.3118 * compute**-0.1250


def suggested_batch_tokens(compute: float) -> float:
    """B = 0.2920·C^0.3271, the tokens of a batch (arXiv:2401.02954, equation 1)."""
    return 0.2920 * compute**0.3271

"""Whether a run's token budget fits its model: 20 to 26 tokens per active parameter.

REQ-T2P-1: tokens = r × active parameters, r in [20, 26].
REQ-T2P-2: steps = tokens ÷ (global batch × sequence length).

Hoffmann et al. 2022 (arXiv:2203.15556); docs/CHINCHILLA_SCALING.md says where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import count

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_steps

TARGET_RATIO = 20
MAX_RATIO = 26


class Verdict(Enum):
    """The result of checking a budget."""

    COMPLIES = "complies"
    UNDERTRAINED = "undertrained"
    OVERTRAINED = "overtrained"
    DELIBERATELY_OVERTRAINED = "deliberately overtrained"

    @property
    def accepted(self) -> bool:
        """Whether the budget is in the range, or above it and marked as deliberate."""
        return self in (Verdict.COMPLIES, Verdict.DELIBERATELY_OVERTRAINED)


@dataclass(frozen=True)
class Compliance:
    """A run's budget compared with the range, in tokens per active parameter; `reason` says what to change."""

    name: str
    active_parameters: int
    target_ratio: int
    required_tokens: int  # at the target ratio
    total_tokens: int
    actual_ratio: float
    steps: int
    verdict: Verdict
    reason: str


def check_compliance(name: str, config: RunConfig) -> Compliance:
    """Checks a run's budget with integer arithmetic; `name` is copied into the result."""
    active, tokens = count_active_parameters(config.model), budget_in_tokens(config)
    verdict = _verdict(active, tokens, config.training.deliberate_overtraining)
    return Compliance(
        name=name,
        active_parameters=active,
        target_ratio=TARGET_RATIO,
        required_tokens=TARGET_RATIO * active,
        total_tokens=tokens,
        actual_ratio=tokens / active,
        steps=planned_steps(config),
        verdict=verdict,
        reason=_REASONS[verdict](config, active, tokens),
    )


def format_ratio(tokens: int, active: int) -> str:
    """The ratio with one decimal, or with more if rounding would show a bound that it does not equal."""
    ratio = Fraction(tokens, active)
    for digits in count(1):
        rounded = round(ratio, digits)
        if rounded == ratio or rounded not in (TARGET_RATIO, MAX_RATIO):
            return f"{float(rounded):.{digits}f}"
    raise AssertionError("some number of decimals shows any difference")


def _verdict(active: int, tokens: int, deliberate: bool) -> Verdict:
    if tokens < TARGET_RATIO * active:
        return Verdict.UNDERTRAINED
    if tokens <= MAX_RATIO * active:
        return Verdict.COMPLIES
    return Verdict.DELIBERATELY_OVERTRAINED if deliberate else Verdict.OVERTRAINED


def _complies(config: RunConfig, _active: int, _tokens: int) -> str:
    mark = "; training.deliberate_overtraining is not needed" if config.training.deliberate_overtraining else ""
    return f"{TARGET_RATIO} to {MAX_RATIO} tokens per active parameter; {_steps(config)}{mark}"


def _undertrained(config: RunConfig, active: int, tokens: int) -> str:
    mark = (
        " (training.deliberate_overtraining has no effect here)" if config.training.deliberate_overtraining else ""
    )
    return (
        f"{_found(active, tokens)}, below {TARGET_RATIO}{mark}: set training.total_tokens to {TARGET_RATIO}x "
        f"({TARGET_RATIO * active:,} tokens), or choose a smaller model"
    )


def _overtrained(_config: RunConfig, active: int, tokens: int) -> str:
    return (
        f"{_found(active, tokens)}, above {MAX_RATIO}: set training.total_tokens to at most {MAX_RATIO}x "
        f"({MAX_RATIO * active:,} tokens), choose a larger model, or, if that is deliberate, set "
        "training.deliberate_overtraining to true"
    )


def _deliberately_overtrained(config: RunConfig, active: int, tokens: int) -> str:
    return f"{_found(active, tokens)}, above {MAX_RATIO} and marked as deliberate; {_steps(config)}"


_REASONS = {
    Verdict.COMPLIES: _complies,
    Verdict.UNDERTRAINED: _undertrained,
    Verdict.OVERTRAINED: _overtrained,
    Verdict.DELIBERATELY_OVERTRAINED: _deliberately_overtrained,
}


def _found(active: int, tokens: int) -> str:
    return f"training.total_tokens = {tokens:,} is {format_ratio(tokens, active)} tokens per active parameter"


def _steps(config: RunConfig) -> str:
    size = f"{'up to ' if config.training.batch_ramp else ''}{config.tokens_per_step:,} tokens"
    return f"{planned_steps(config):,} steps of {size}"

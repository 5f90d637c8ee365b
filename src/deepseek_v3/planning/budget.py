"""The token budget of a run, and the steps that spend it, from its config alone.

A run ends with the first step that reaches its budget: steps = tokens ÷
(global batch × sequence length), rounded up.
"""

from __future__ import annotations

from fractions import Fraction

from deepseek_v3.config.train_config import BatchRampConfig, RunConfig, batch_sizes
from deepseek_v3.planning.counts import count_active_parameters


def budget_in_tokens(config: RunConfig) -> int:
    """`training.total_tokens` as a number: given, or that many times the active parameters."""
    budget = config.training.total_tokens
    if isinstance(budget, int):
        return budget
    return round(Fraction(budget.removesuffix("x")) * count_active_parameters(config.model))


def planned_steps(config: RunConfig) -> int:
    """Number of optimizer steps."""
    ramp = _ramp_borders(config)
    return len(ramp) - 1 + _steps_after(ramp, config)


def planned_tokens(config: RunConfig) -> int:
    """Tokens trained on when the run ends: the budget, filled up to a whole last step."""
    ramp = _ramp_borders(config)
    samples = ramp[-1] + _steps_after(ramp, config) * config.training.global_batch_size
    return samples * config.training.sequence_length


def sample_borders(config: RunConfig) -> list[int]:
    """Samples used before each step, and at last after the final one."""
    ramp, batch_size = _ramp_borders(config), config.training.global_batch_size
    return ramp + [ramp[-1] + batch_size * step for step in range(1, _steps_after(ramp, config) + 1)]


def _samples_needed(config: RunConfig) -> int:
    return _ceil_div(budget_in_tokens(config), config.training.sequence_length)


def _steps_after(ramp: list[int], config: RunConfig) -> int:
    """Steps of the full batch that follow the ramp."""
    left = max(0, _samples_needed(config) - ramp[-1])
    return _ceil_div(left, config.training.global_batch_size)


def _ramp_borders(config: RunConfig) -> list[int]:
    """Borders of the steps whose batch still grows; only the start, 0, where the batch is constant."""
    borders, ramp = [0], config.training.batch_ramp
    if ramp:
        needed = _samples_needed(config)
        while borders[-1] < needed and borders[-1] / needed < ramp.fraction:
            borders.append(borders[-1] + _batch_size(ramp, config, borders[-1] / needed))
    return borders


def _batch_size(ramp: BatchRampConfig, config: RunConfig, used: float) -> int:
    """Sequences of a step that starts with the share `used` of the budget behind it, inside the ramp."""
    last = config.training.global_batch_size
    unit = batch_sizes(config.training).step
    size = ramp.initial + (last - ramp.initial) * used / ramp.fraction
    return max(unit, round(size / unit) * unit)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)

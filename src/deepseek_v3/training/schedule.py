"""The schedule of a run: the samples of each step, and every value that changes over the run.

All of it is a function of the config and the step, so a resumed run needs only the number of its step. As in the
report (§4.2), phases begin and end at shares of the token budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from deepseek_v3.config.train_config import RunConfig, ScheduleConfig
from deepseek_v3.planning.token_budget import budget_in_tokens, sample_boundaries

# Shares of the report's 14.8T tokens: constant to 10T, cosine over 4.3T, constant for 333B, lower for 167B.
_CONSTANT_UNTIL = 10e12 / 14.8e12
_COSINE_UNTIL = 14.3e12 / 14.8e12
_FIRST_TAIL_UNTIL = (14.8e12 - 167e9) / 14.8e12
_FIRST_TAIL_RATIO = 2.2e-5 / 2.2e-4
_SECOND_TAIL_RATIO = 7.3e-6 / 2.2e-4


@dataclass(frozen=True)
class ScheduledStep:
    """One optimizer step: its samples, and the values of scheduled quantities during it."""

    number: int  # from 1
    first_sample: int
    num_samples: int
    learning_rate: float
    mtp_weight: float
    bias_update_speed: float


class TrainingSchedule:
    """The steps of a run; the last one is the first that reaches the token budget."""

    def __init__(self, config: RunConfig) -> None:
        self.training = config.training
        self.total_tokens = budget_in_tokens(config)
        self._borders = sample_boundaries(config)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps."""
        return len(self._borders) - 1

    def tokens_after(self, step: int) -> int:
        """The number of tokens trained on after step `step`; 0 for step 0."""
        return self._borders[step] * self.training.sequence_length

    def step(self, number: int) -> ScheduledStep:
        """Step `number`, from 1 to `total_steps`."""
        first, end = self._borders[number - 1], self._borders[number]
        used = first * self.training.sequence_length / self.total_tokens
        prediction, balance = self.training.prediction, self.training.balance
        return ScheduledStep(
            number=number,
            first_sample=first,
            num_samples=end - first,
            learning_rate=self.training.optimizer.learning_rate
            * learning_rate_ratio(self.training.schedule, number, used),
            mtp_weight=prediction.weight if used < prediction.switch_at else prediction.final_weight,
            bias_update_speed=balance.bias_update_speed if used < balance.bias_update_until else 0.0,
        )

    def micro_batches(self, step: ScheduledStep, size: int, rank: int = 0, ranks: int = 1) -> list[tuple[int, int]]:
        """Lists (first sample, number of samples) of each micro-batch that rank `rank` runs in a step, in order.

        Each rank takes an equal number of consecutive samples; `ranks * size` must divide the samples of the step.
        """
        share = step.num_samples // ranks
        first = step.first_sample + rank * share
        ends = range(first, first + share + 1, size)
        return [(start, end - start) for start, end in pairwise(ends)]


def learning_rate_ratio(schedule: ScheduleConfig, step: int, used: float) -> float:
    """The learning rate at step `step` (from 1) over its peak; `used`: the share of the budget used before it."""
    warmup = min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.kind == "cosine":
        return warmup * _cosine(used, 1.0, schedule.final_ratio)
    if schedule.kind == "wsd":
        decayed = max(0.0, (used - (1 - schedule.decay_fraction)) / schedule.decay_fraction)
        return warmup * (1 - decayed * (1 - schedule.final_ratio))
    return warmup * _report_ratio(used)


def _report_ratio(used: float) -> float:
    if used < _CONSTANT_UNTIL:
        return 1.0
    if used < _COSINE_UNTIL:
        return _cosine((used - _CONSTANT_UNTIL) / (_COSINE_UNTIL - _CONSTANT_UNTIL), 1.0, _FIRST_TAIL_RATIO)
    return _FIRST_TAIL_RATIO if used < _FIRST_TAIL_UNTIL else _SECOND_TAIL_RATIO


def _cosine(share: float, start: float, end: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

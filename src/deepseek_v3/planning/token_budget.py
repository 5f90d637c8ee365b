"""The token budget of a run and its division into steps, from the config alone.

A run ends with the first step that reaches its budget: steps = tokens ÷ (global batch × sequence length), rounded
up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import overload

from deepseek_v3.config.train_config import BatchRampConfig, RunConfig, batch_sizes
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.utils.errors import ConfigError

# The largest number of batch sizes in a ramp; the report's ramp has fewer than 13,000.
_MAX_SIZES = 50_000


def budget_in_tokens(config: RunConfig) -> int:
    """`training.total_tokens` as a number of tokens; `20x` is 20 times the active parameters."""
    budget = config.training.total_tokens
    if isinstance(budget, int):
        return budget
    return round(Fraction(budget.removesuffix("x")) * count_active_parameters(config.model))


def planned_steps(config: RunConfig) -> int:
    """Number of optimizer steps of a run."""
    return len(sample_boundaries(config)) - 1


def planned_tokens(config: RunConfig) -> int:
    """Tokens that a run trains on: its budget, rounded up to a whole last step."""
    return sample_boundaries(config)[-1] * config.training.sequence_length


class SampleBoundaries(Sequence[int]):
    """Item i is the number of samples used before step i; the last item is that of the whole run.

    Stores one entry per batch size of the run, not per step. `sizes` are pairs of a batch size and its number of
    consecutive steps, in the order of the run.
    """

    def __init__(self, sizes: Iterable[tuple[int, int]]) -> None:
        self._sizes: list[int] = []
        self._first_steps, self._first_samples = [0], [0]
        for size, steps in sizes:
            self._sizes.append(size)
            self._first_steps.append(self._first_steps[-1] + steps)
            self._first_samples.append(self._first_samples[-1] + size * steps)

    def __len__(self) -> int:
        return self._first_steps[-1] + 1

    @overload
    def __getitem__(self, step: int) -> int: ...
    @overload
    def __getitem__(self, step: slice) -> list[int]: ...
    def __getitem__(self, step: int | slice) -> int | list[int]:
        if isinstance(step, slice):
            return [self[each] for each in range(len(self))[step]]
        step = range(len(self))[step]
        phase = bisect_right(self._first_steps, step) - 1
        size = self._sizes[phase] if phase < len(self._sizes) else 0
        return self._first_samples[phase] + (step - self._first_steps[phase]) * size


@lru_cache
def sample_boundaries(config: RunConfig) -> SampleBoundaries:
    """The samples before each step of a run. Raises ConfigError if the batch ramp has too many sizes."""
    sizes, used = _ramp_sizes(config)
    left = max(0, _samples_needed(config) - used)
    batch_size = config.training.global_batch_size
    return SampleBoundaries([*sizes, (batch_size, _ceil_div(left, batch_size))] if left else sizes)


def _samples_needed(config: RunConfig) -> int:
    return _ceil_div(budget_in_tokens(config), config.training.sequence_length)


def _ramp_sizes(config: RunConfig) -> tuple[list[tuple[int, int]], int]:
    """Pairs of batch size and number of steps during the ramp, and the number of samples that these steps use."""
    ramp, needed = config.training.batch_ramp, _samples_needed(config)
    sizes: list[tuple[int, int]] = []
    used = 0
    if ramp is None:
        return sizes, used
    size_at = _batch_size(ramp, config, needed)
    size, unit = ramp.initial, batch_sizes(config.training).step
    growth = max(config.training.global_batch_size - ramp.initial, 1) / (ramp.fraction * needed)  # per sample

    def is_over(samples: int) -> bool:
        return samples >= needed or samples / needed >= ramp.fraction

    def changes(steps: int) -> bool:
        """Whether the ramp ends, or the batch size changes, after `steps` steps of `size` samples."""
        samples = used + steps * size
        return is_over(samples) or size_at(samples) != size

    while not is_over(used):
        if len(sizes) == _MAX_SIZES:
            raise ConfigError(
                f"training.batch_ramp: the batch grows through more than {_MAX_SIZES:,} sizes; set a larger "
                "training.batch_ramp.increment, which divides training.batch_ramp.initial and "
                "training.global_batch_size"
            )
        size = size_at(used)
        last = (size + unit / 2 - ramp.initial) / growth  # from here on the ramp rounds to a larger size
        steps = _first(changes, math.ceil((last - used) / size))
        sizes.append((size, steps))
        used += size * steps
    return sizes, used


def _first(holds: Callable[[int], bool], guess: int) -> int:
    """The smallest number from 1 on for which the monotonic `holds` is true, found by bisection from a guess."""
    low, high, reach = 0, max(1, guess), 1
    while not holds(high):
        low, high, reach = high, high + reach, 2 * reach
    while high - low > 1 and low == 0:
        below = max(1, high - reach)
        if not holds(below):
            low = below
        elif below == 1:
            return 1
        else:
            high, reach = below, 2 * reach
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _batch_size(ramp: BatchRampConfig, config: RunConfig, needed: int) -> Callable[[int], int]:
    """The batch size inside the ramp as a function of the samples used before; the budget has `needed` samples."""
    last = config.training.global_batch_size
    unit = batch_sizes(config.training).step

    def size_at(samples: int) -> int:
        size = ramp.initial + (last - ramp.initial) * (samples / needed) / ramp.fraction
        return max(unit, round(size / unit) * unit)

    return size_at


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)

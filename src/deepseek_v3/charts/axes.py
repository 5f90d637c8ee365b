"""Axes of charts: linear and logarithmic scales with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_NEARLY = 1e-9


@dataclass(frozen=True)
class Scale:
    """Places values between `low` and `high` on a line from 0 to 1; values outside are moved to its ends."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """The place of a value, from 0 to 1."""
        low, high, value = (self._position(each) for each in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round values of the scale, ascending."""
        return _log_ticks(self.low, self.high, most) if self.is_log else _linear_ticks(self.low, self.high, most)

    def _position(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value


def scale_of(values: Sequence[float], *, is_log: bool = False, from_zero: bool = False) -> Scale:
    """The scale of finite `values`, with some room if they are all equal; of no values, from 0 to 1.

    A logarithmic scale leaves out values that are not positive, and is linear if none is left.
    """
    kept = [value for value in values if value > 0] if is_log else list(values)
    if not kept:
        return Scale(0.0, 1.0)
    low, high = min(kept), max(kept)
    if is_log:
        return Scale(low, high, True) if high > low * (1 + _NEARLY) else Scale(low / 2, high * 2, True)
    low = min(low, 0.0) if from_zero else low
    if high - low <= _NEARLY * max(abs(low), abs(high)):
        room = abs(high) / 10 or 1.0
        return Scale(low if from_zero else low - room, high + room)
    return Scale(low, high)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = _round_step((high - low) / max(most, 1))
    first = math.ceil(low / step - _NEARLY)
    return [number * step for number in range(first, math.floor(high / step + _NEARLY) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, or their first few multiples if there are too few powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [value for value in found if low * (1 - _NEARLY) <= value <= high * (1 + _NEARLY)]
        if len(found) <= most:
            break
    return found[:: -(-len(found) // most)] if found else [low, high]


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - _NEARLY))

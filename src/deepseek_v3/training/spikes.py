"""Finds spikes: steps whose loss or gradient norm is far above those of the steps before them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from deepseek_v3.config.train_config import SpikeConfig
from deepseek_v3.training.optimizer import NO_LIMITS, StepLimits

_NORMAL = 1.4826  # the standard deviation of normal noise over its MAD
_LEAST_DEVIATION = 0.01  # as a share of the median: the loss of a huge batch hardly varies


class SpikeDetector:
    """The limits of a step, from the last `window` steps that were not skipped.

    `window` holds pairs of total loss (nats per token) and gradient norm, the oldest first. Until it is full,
    nothing is a spike. A resumed run starts from the window of its checkpoint.
    """

    def __init__(self, config: SpikeConfig, window: Iterable[tuple[float, float]] = ()) -> None:
        self._config = config
        self.window = deque(window, maxlen=config.window)

    def add(self, loss: float, norm: float) -> None:
        """Adds a step that was not skipped."""
        self.window.append((loss, norm))

    def limits(self) -> StepLimits:
        """The largest loss and gradient norm that are no spikes after the steps of the window."""
        if self._config.action == "ignore" or len(self.window) < self._config.window:
            return NO_LIMITS
        losses, norms = zip(*self.window, strict=True)
        return StepLimits(
            upper_limit(losses, self._config.loss_threshold), upper_limit(norms, self._config.norm_threshold)
        )

    def state(self) -> list[list[float]]:
        """The window as JSON values, for a checkpoint."""
        return [list(pair) for pair in self.window]


def upper_limit(values: Iterable[float], threshold: float) -> float:
    """The median of `values` plus `threshold` robust standard deviations."""
    kept = list(values)
    middle = median(kept)
    deviation = _NORMAL * median(abs(value - middle) for value in kept)
    return middle + threshold * max(deviation, _LEAST_DEVIATION * abs(middle))


def limits_to_json(limits: StepLimits) -> dict[str, Any]:
    """Limits as JSON values, which have no infinity: null for none."""
    return {name: limit if math.isfinite(limit) else None for name, limit in limits._asdict().items()}


def limits_from_json(stored: dict[str, Any]) -> StepLimits:
    """The inverse of `limits_to_json`."""
    return StepLimits(**{name: math.inf if limit is None else limit for name, limit in stored.items()})

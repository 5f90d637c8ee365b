"""Anomalies: steps whose loss or gradient is not finite, and spikes. Both are reported, counted and may be skipped.

The device decides whether a step is skipped, by limits that the host computed before it launched the step. So the
host waits for nothing, and a skipped step changes no weight, moment or routing bias on any rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from deepseek_v3.config.train_config import TrainingConfig
from deepseek_v3.training.optimizer import NO_LIMITS, StepLimits
from deepseek_v3.training.parallel.engine import StepResult
from deepseek_v3.training.spikes import SpikeDetector, limits_from_json, limits_to_json
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.host_copy import HostCopy
from deepseek_v3.utils.logging import get_logger

_ADVICE = (
    "Lower training.optimizer.learning_rate, or lengthen training.schedule.warmup_steps, and resume an earlier "
    "checkpoint; events.jsonl in the run's folder names the samples"
)


class Anomaly(NamedTuple):
    """A step with an anomaly: its total loss (nats per token), its gradient norm, and their limits."""

    step: int
    kind: Literal["not finite", "spike"]
    loss: float
    norm: float
    limits: StepLimits
    skipped: bool

    def __str__(self) -> str:
        found = f"step {self.step}: total loss {_shown(self.loss)}, gradient norm {_shown(self.norm)}"
        if self.kind == "not finite":
            return found
        return f"{found}: a spike, above {self.limits.loss:.6g} or {self.limits.norm:.6g}"


class RecentSteps(NamedTuple):
    """What a resumed run needs to judge its next steps as an uninterrupted run would.

    `total`: skipped steps so far; `in_a_row`: how many of them were the last ones; `window` and `limits`: the state
    of the `SpikeDetector`, and the limits of the next step.
    """

    total: int = 0
    in_a_row: int = 0
    window: tuple[tuple[float, float], ...] = ()
    limits: StepLimits = NO_LIMITS

    @classmethod
    def from_checkpoint(cls, plain: dict[str, Any], total: int) -> RecentSteps:
        """From the plain entries of a checkpoint; one of an older version has no window."""
        in_a_row, stored = plain.get("skipped_in_a_row", 0), plain.get("recent_steps")
        if stored is None:
            return cls(total, in_a_row)
        window = tuple((loss, norm) for loss, norm in stored["window"])
        return cls(total, in_a_row, window, limits_from_json(stored["limits"]))


class AnomalyMonitor:
    """Judges every step of a run, with the same result on all ranks.

    `add` waits for nothing, and `read` waits for the step that was added; a step that is read after the launch of
    the next one leaves the device with work. `total` and `in_a_row` count the skipped steps that have been read.
    The limits of a step follow from the steps up to the second one before it, whether or not the last one has been
    read by then. `record` is called with each anomaly.
    """

    def __init__(
        self,
        config: TrainingConfig,
        record: Callable[[Anomaly], None] = lambda _: None,
        before: RecentSteps | None = None,
    ) -> None:
        self._config, self._record = config, record
        self._unread: tuple[int, StepLimits, HostCopy] | None = None
        self.restore(before or RecentSteps())

    def restore(self, before: RecentSteps) -> None:
        """Continues after the steps of a checkpoint. The last step must have been read."""
        assert self._unread is None
        self.total, self.in_a_row = before.total, before.in_a_row
        self._spikes = SpikeDetector(self._config.spikes, before.window)
        self._limits = before.limits
        self.wants_rollback = False  # since a step that has been read

    @property
    def limits(self) -> StepLimits:
        """The limits that the device enforces on the next step."""
        return self._limits if self._config.spikes.action in ("skip", "rollback") else NO_LIMITS

    def add(self, number: int, result: StepResult) -> None:
        """Adds step `number`; the previous one must have been read."""
        assert self._unread is None
        figures = torch.stack([result.losses.total.double(), result.norm.double(), result.accepted.double()])
        self._unread = number, self._limits, HostCopy(figures)
        self._limits = self._spikes.limits()

    def read(self) -> None:
        """Judges the last step, and reports an anomaly. Raises TrainingError after too many skipped steps."""
        if self._unread is None:
            return
        number, limits, figures = self._unread
        loss, norm, accepted = figures.read()
        self._unread = None
        if accepted:
            self.in_a_row = 0
            self._spikes.add(loss, norm)
        else:
            self.total += 1
            self.in_a_row += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._report(Anomaly(number, "not finite", loss, norm, limits, skipped=True))
        elif not accepted or loss > limits.loss or norm > limits.norm:
            self._report(Anomaly(number, "spike", loss, norm, limits, skipped=not accepted))

    def state(self) -> dict[str, Any]:
        """The entries of a checkpoint from which `RecentSteps` are read. The last step must have been read."""
        assert self._unread is None
        recent = {"window": self._spikes.state(), "limits": limits_to_json(self._limits)}
        return {"skipped_in_a_row": self.in_a_row, "recent_steps": recent}

    def _report(self, anomaly: Anomaly) -> None:
        self._record(anomaly)
        if anomaly.skipped and self.in_a_row > self._config.max_skipped_steps:
            raise TrainingError(
                f"{anomaly}; {self.in_a_row} steps in a row were skipped, and training.max_skipped_steps = "
                f"{self._config.max_skipped_steps}. The run stops; nothing was changed since step "
                f"{anomaly.step - self.in_a_row}, and its last checkpoint is intact. {_ADVICE}"
            )
        self.wants_rollback |= anomaly.kind == "spike" and self._config.spikes.action == "rollback"
        log = get_logger("Trainer")
        if anomaly.skipped:
            log.warning(
                f"{anomaly}: skipped on all ranks, no weight, moment or routing bias was changed; "
                f"{self.in_a_row} in a row, {self.total} in all"
            )
        else:
            log.warning(f"{anomaly}; training.spikes.action=skip would skip such steps")


def _shown(number: float) -> str:
    return f"{number:.6g}"

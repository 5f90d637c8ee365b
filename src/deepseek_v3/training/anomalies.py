"""Steps whose loss or gradient is not finite: each is logged, and too many in a row stop the run."""

from __future__ import annotations

import math

import torch

from deepseek_v3.training.parallel.engine import StepResult
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.host_copy import HostCopy
from deepseek_v3.utils.logging import get_logger


class SkippedSteps:
    """Counts the steps that were skipped because their loss or gradient was not finite.

    `add` waits for nothing, and `read` waits for the step that was added; a step that is read after the launch of
    the next one leaves the device with work. `total` and `in_a_row` count the steps that have been read. The values
    are the same on all ranks; if these read after the same steps, they stop after the same step.

    More than `max_in_a_row` skipped steps in a row stop the run. A resumed run starts from the `total` and
    `in_a_row` of its checkpoint.
    """

    def __init__(self, max_in_a_row: int, total: int = 0, in_a_row: int = 0) -> None:
        self.total, self.in_a_row = total, in_a_row
        self._max_in_a_row = max_in_a_row
        self._unread: tuple[int, HostCopy] | None = None

    def add(self, number: int, result: StepResult) -> None:
        """Adds step `number`; the previous one must have been read."""
        assert self._unread is None
        self._unread = number, HostCopy(torch.stack([result.losses.total, result.norm]))

    def read(self) -> None:
        """Counts the last step; warns if it was skipped. Raises TrainingError if too many were in a row."""
        if self._unread is None:
            return
        number, figures = self._unread
        loss, norm = figures.read()
        self._unread = None
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        found = f"step {number}: total loss {loss}, gradient norm {norm}"
        if self.in_a_row > self._max_in_a_row:
            raise TrainingError(
                f"{found}; {self.in_a_row} steps in a row were not finite, and training.max_skipped_steps = "
                f"{self._max_in_a_row}. The run stops; nothing was changed since step "
                f"{number - self.in_a_row}, and its last checkpoint is intact. "
                "Lower training.optimizer.learning_rate, or lengthen training.schedule.warmup_steps, and resume an "
                "earlier checkpoint"
            )
        get_logger("Trainer").warning(
            f"{found}: skipped on all ranks, no weight, moment or routing bias was changed; "
            f"{self.in_a_row} in a row, {self.total} in all"
        )

"""Steps whose loss or gradient is not finite: each is logged, and too many in a row stop the run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.training.parallel.engine import StepResult
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.logging import get_logger


class _Unread(NamedTuple):
    """Loss and gradient norm of a step, being copied from the device: float32 (2,) in CPU memory."""

    number: int
    figures: Tensor
    arrived: torch.cuda.Event | None


class SkippedSteps:
    """Counts the steps that were skipped because their loss or gradient was not finite.

    `add` reads loss and norm of the previous step, so that the device has a step to work on while the CPU waits;
    `read` waits for the last step. `total` and `in_a_row` count the steps that have been read. The values are the
    same on all ranks, which therefore stop after the same step.

    More than `max_in_a_row` skipped steps in a row stop the run. A resumed run starts from the `total` and
    `in_a_row` of its checkpoint.
    """

    def __init__(self, max_in_a_row: int, total: int = 0, in_a_row: int = 0) -> None:
        self.total, self.in_a_row = total, in_a_row
        self._max_in_a_row = max_in_a_row
        self._unread: _Unread | None = None

    def add(self, number: int, result: StepResult) -> None:
        """Adds step `number`. Raises TrainingError as `read` does, for the previous step."""
        self.read()
        found = torch.stack([result.losses.total, result.norm])
        figures = found.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None
        self._unread = _Unread(number, figures, arrived)

    def read(self) -> None:
        """Counts the last step; warns if it was skipped. Raises TrainingError if too many were in a row."""
        unread, self._unread = self._unread, None
        if unread is None:
            return
        if unread.arrived is not None:
            unread.arrived.synchronize()
        if unread.figures.isfinite().all():
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        loss, norm = unread.figures.tolist()
        found = f"step {unread.number}: total loss {loss}, gradient norm {norm}"
        if self.in_a_row > self._max_in_a_row:
            raise TrainingError(
                f"{found}; {self.in_a_row} steps in a row were not finite, and training.max_skipped_steps = "
                f"{self._max_in_a_row}. The run stops; nothing was changed since step "
                f"{unread.number - self.in_a_row}, and its last checkpoint is intact. "
                "Lower training.optimizer.learning_rate, or lengthen training.schedule.warmup_steps, and resume an "
                "earlier checkpoint"
            )
        get_logger("Trainer").warning(
            f"{found}: skipped on all ranks, no weight, moment or routing bias was changed; "
            f"{self.in_a_row} in a row, {self.total} in all"
        )

"""Stopping in good order: a signal asks, the loop answers after the step in hand, the same on all ranks."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from deepseek_v3.utils.logging import get_logger

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, the first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 asks to stop; a second one acts at once.

    Of several ranks each may be asked, and `agreed` tells all of them after the same step. There a second signal
    changes nothing: launchers pass theirs on to ranks that the terminal has signalled already, and kill those that
    stay too long.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._is_alone = num_ranks == 1
        self._asked_by = 0  # the signal's number, or 0

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked."""
        return self._asked_by != 0

    def agreed(self) -> bool:
        """Whether to stop after this step: to be called by every rank, once in each step.

        Of several ranks it takes one reduction of a single number on the CPUs, which waits for no GPU.
        """
        if self._is_alone:
            return self.requested
        highest = torch.tensor(self._asked_by)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        number = int(highest)
        if number and dist.get_rank() == 0:
            _log(number, "all ranks stop after this step and save")
        return number != 0

    def __enter__(self) -> StopRequest:
        self._earlier = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked_by = number
        if self._is_alone:
            self._restore()
            _log(number, "finishing this step and saving; once more to stop at once")

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


def _log(number: int, consequence: str) -> None:
    get_logger("Trainer").info(f"{signal.Signals(number).name}: {consequence}")

"""Stopping in good order: a signal asks, the loop answers after the step in hand, the same on all ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from deepseek_v3.utils.logging import get_logger

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_FAILURE = max(signal.valid_signals()) + 1  # in place of a signal's number


class StopRequest:
    """From `listen` to the end of the `with` block, the first SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP (a closed
    terminal) asks to stop. SIGHUP stays ignored where it is, as under nohup.

    In a process alone a second signal acts at once, except in `saving`, where it waits until the checkpoint is
    complete. From the last save on only SIGINT acts: nothing is left that another signal could stop.

    Of several ranks each may be asked, and `agreed` tells all of them after the same step. There a second signal
    changes nothing: launchers pass theirs on to ranks that the terminal has signalled already, and kill those that
    stay too long.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._is_alone = num_ranks == 1
        self._asked_by = 0  # the signal's number, or 0
        self._has_failed = False
        self._waiting = 0  # the number of a further signal that waits for the end of a save, or 0
        self._saves = self._ends = False
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked."""
        return self._asked_by != 0

    def ask_after_failure(self) -> None:
        """Asks for the reason that this rank has nothing to go on with; what it is, the caller tells."""
        self._has_failed = True

    def agreed(self) -> bool:
        """Whether to stop after this step: to be called by every rank, once in each step.

        Of several ranks it takes one reduction of a single number on the CPUs, which waits for no GPU.
        """
        if self._is_alone:
            return self.requested or self._has_failed
        highest = torch.tensor(_FAILURE if self._has_failed else self._asked_by)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        number = int(highest)
        if 0 < number < _FAILURE and dist.get_rank() == 0:
            _log(number, "all ranks stop after this step and save")
        return number != 0

    @contextmanager
    def saving(self, last: bool) -> Iterator[None]:
        """While entered, no signal interrupts; `last` says that this is the last checkpoint of the process."""
        self._saves, self._ends = True, self._ends or last
        try:
            yield
        finally:
            self._saves = False
        if self._waiting:
            self._act(self._waiting)

    def listen(self) -> None:
        """Installs the handlers in place of the ones that were there."""
        outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in _SIGNALS if number != signal.SIGHUP or not outlives_terminal]
        self._earlier = {number: signal.signal(number, self._ask) for number in heard}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        repeated, self._asked_by = self.requested, number
        if not self._is_alone:
            return
        if not repeated:
            _log(number, "finishing this step and saving; once more to stop at once")
        elif self._ends and number != signal.SIGINT:
            return
        elif not self._saves:
            self._act(number)
        elif not self._waiting:
            self._waiting = number
            _log(number, "stopping as soon as the checkpoint that is being written is complete")

    def _act(self, number: int) -> None:
        """Does what the signal would have done without us."""
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}


def _log(number: int, consequence: str) -> None:
    get_logger("Trainer").info(f"{signal.Signals(number).name}: {consequence}")

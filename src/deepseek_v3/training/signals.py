"""Graceful stop on a signal: the run finishes its step, saves and ends, on all ranks after the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from deepseek_v3.utils.interrupts import STOP_SIGNALS
from deepseek_v3.utils.logging import get_logger

_FAILURE = max(signal.valid_signals()) + 1  # reported instead of a signal's number


class GracefulStop:
    """Stops a run between two steps, after a signal, so that it can save a last checkpoint.

    From `install` to the end of the `with` block, the first SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP (the
    terminal was closed) requests a stop. A SIGHUP that was ignored before, as under nohup, stays ignored.

    With one process, a second signal acts at once; during `saving` it is deferred until the checkpoint is complete.
    From the last `saving` on, only SIGINT acts, because no other signal has anything left to stop.

    With several ranks, any of them may receive the signal, and `should_stop` returns true on all ranks after the
    same step. A second signal then has no effect: a launcher forwards its signal to ranks that the terminal has
    already signalled, and kills ranks that take too long to stop.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._is_alone = num_ranks == 1
        self._received = 0  # the number of the last signal, or 0
        self._has_failed = False
        self._deferred = 0  # the number of a signal that acts after the checkpoint is saved, or 0
        self._is_saving = self._is_last_save = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank has received a signal."""
        return self._received != 0

    def request_after_failure(self) -> None:
        """Requests a stop because this rank cannot continue; the caller reports the reason."""
        self._has_failed = True

    def should_stop(self) -> bool:
        """Whether to stop after this step. Every rank must call it once per step.

        With several ranks it costs one all-reduce of a single number between CPUs, which waits for no GPU.
        """
        if self._is_alone:
            return self.requested or self._has_failed
        highest = torch.tensor(_FAILURE if self._has_failed else self._received)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        number = int(highest)
        if 0 < number < _FAILURE and dist.get_rank() == 0:
            _log(number, "all ranks stop after this step and save")
        return number != 0

    @contextmanager
    def saving(self, last: bool) -> Iterator[None]:
        """Defers signals inside the block. `last` says that this is the last checkpoint of the process."""
        self._is_saving, self._is_last_save = True, self._is_last_save or last
        try:
            yield
        finally:
            self._is_saving = False
        if self._deferred:
            self._act(self._deferred)

    def install(self) -> None:
        """Installs the signal handlers; the end of the `with` block restores the previous ones."""
        outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not outlives_terminal]
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in handled}

    def __enter__(self) -> GracefulStop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        repeated, self._received = self.requested, number
        if not self._is_alone:
            return
        if not repeated:
            _log(number, "finishing this step and saving; once more to stop at once")
        elif self._is_last_save and number != signal.SIGINT:
            return
        elif not self._is_saving:
            self._act(number)
        elif not self._deferred:
            self._deferred = number
            _log(number, "stopping as soon as the checkpoint that is being written is complete")

    def _act(self, number: int) -> None:
        """Restores the previous handlers and raises the signal again."""
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def _log(number: int, consequence: str) -> None:
    get_logger("Trainer").info(f"{signal.Signals(number).name}: {consequence}")

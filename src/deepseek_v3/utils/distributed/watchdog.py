"""Ends a job of several ranks, with one message, when one rank dies, hangs, or loses its host.

Without it the other ranks wait in a collective operation for the rank that died, each until its own timeout, and
each prints a traceback that does not name that rank. Here every rank publishes heartbeats and checks those of
others, in a thread that takes part in no collective operation. A rank that detects a failure publishes a report.
The store keeps the first report; the rank that it names as the reporter logs it, and all ranks end.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from deepseek_v3.utils.distributed.failure_detector import HEARTBEATS_PER_SILENCE, RESUME_ADVICE, RankMonitor
from deepseek_v3.utils.distributed.heartbeat_store import FailureReport, HeartbeatStore
from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.distributed.stack_probe import StackProbe
from deepseek_v3.utils.errors import error_chain
from deepseek_v3.utils.logging import get_logger

_HANG_SHARE = 0.9  # share of a collective operation's timeout, so that the watchdog reports before it times out
_SECONDS_TO_PRINT = 1.0  # for a rank to print its error, before others exit and a launcher ends all ranks
_SECONDS_TO_END = 0.2  # the longest time between two checks of rank 0, which hosts the store and ends last


class Watchdog:
    """While entered, ends this process with exit code 1 once the job cannot continue; does nothing for one rank.

    A rank that is silent for longer than `silence` counts as dead. The others count only the time in which they
    were running themselves, so a job that is suspended and resumed continues. A rank that stays in a step while
    others wait for it is reported after nine tenths of `timeout`, the timeout of a collective operation, before
    that operation raises its own error. Before a process ends, `before_exit` gets up to `grace` to finish work that
    must not be interrupted, such as writing a checkpoint. The process ends even when its main thread hangs.

    When an error leaves the block on one rank, all others end silently, because that error is the message to read.
    From then on the rank ignores SIGTERM, so that no launcher ends it before it has printed the error. An error
    that another rank's death may have caused is held back until that death would have been detected.

    Raises TrainingError, on entering, if ranks are missing after `timeout`.
    """

    def __init__(
        self,
        world: World,
        timeout: timedelta,
        *,
        silence: timedelta = timedelta(seconds=10),
        before_exit: Callable[[], None] | None = None,
        grace: timedelta = timedelta(seconds=20),
    ) -> None:
        self._world, self._timeout = world, timeout
        self._silence, self._grace = silence.total_seconds(), grace.total_seconds()
        self._before_exit = before_exit
        self._step = 0
        self._released, self._store_failed, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._exiting = threading.Lock()  # acquired once, by the thread that ends the process

    def step(self, number: int) -> None:
        """Records that this rank enters a step. Call it when the data is ready, before the first collective."""
        self._step = number

    def finish_first(self, work: Callable[[], None]) -> None:
        """Sets `before_exit` after construction."""
        self._before_exit = work

    def __enter__(self) -> Watchdog:
        if self._world.is_alone:
            return self
        self._probe = StackProbe(threading.get_ident())
        self._store = HeartbeatStore.connect(self._world, self._timeout)
        hang = _HANG_SHARE * self._timeout.total_seconds()
        self._monitor = RankMonitor(self._store, self._silence, hang, time.monotonic)
        self._heart = threading.Thread(target=self._beat_until_released, name="watchdog", daemon=True)
        self._heart.start()
        threading.Thread(target=self._guard_store, name="watchdog of the store", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.is_alone:
            return
        if error is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers end all ranks after the first one that ends
        if any(_may_follow_a_death(cause) for cause in error_chain(error)):
            self._await_report()
        self._released.set()
        self._heart.join()
        with suppress(dist.DistError):  # the end of the store must not change how this rank ends
            if error is None:
                self._finish()
            else:
                self._fail()
        self._closed.set()

    def _await_report(self) -> None:
        """Waits as long as it takes to detect and report another rank's death; such a report ends this process."""
        end = self._monitor.clock.seconds + 1.5 * self._silence
        while self._monitor.clock.seconds < end:
            time.sleep(self._monitor.interval)

    def _finish(self) -> None:
        """Ends without error; rank 0, which hosts the store, keeps checking until all ranks have ended."""
        self._send_heartbeat(ended=True)
        while self._world.rank == 0 and not self._store.have_ended(range(self._world.size)):
            time.sleep(min(self._monitor.interval, _SECONDS_TO_END))
            self._check()

    def _fail(self) -> None:
        """Lets all other ranks end with this one, which is about to print its error."""
        if not self._store.publish_report(FailureReport(failed=(self._world.rank,))):
            self._check()  # finds the report of another rank, which ends the process
        self._send_heartbeat(ended=True)
        while self._world.rank == 0 and self._monitor.others_are_running():
            time.sleep(min(self._monitor.interval, _SECONDS_TO_END))

    def _beat_until_released(self) -> None:
        try:
            while not self._released.wait(self._monitor.interval):
                self._send_heartbeat()
                self._check()
        except dist.DistError:
            self._store_failed.set()

    def _guard_store(self) -> None:
        """Ends the process when the store does not answer the thread that sends heartbeats, which may then hang.

        Counts intervals, not seconds: a process that was suspended must not take its own pause for the store's.
        """
        answers = intervals = 0
        while not self._closed.is_set():
            self._store_failed.wait(self._monitor.interval)
            if self._monitor.answers != answers:
                answers, intervals = self._monitor.answers, 0
            intervals += 1
            if self._store_failed.is_set() or intervals > HEARTBEATS_PER_SILENCE:
                self._exit_without_store()

    def _send_heartbeat(self, *, ended: bool = False) -> None:
        location, waiting_seconds = self._probe.sample(time.monotonic())
        self._monitor.send(self._step, location, waiting_seconds, ended=ended)

    def _check(self) -> None:
        report = self._monitor.check()
        if report is not None:
            self._exit(report)

    def _exit(self, report: FailureReport) -> None:
        """Ends the process after the reporter; rank 0, which hosts the store, ends after all ranks that read it."""
        self._exiting.acquire()
        if report.reporter == self._world.rank:
            get_logger("Watchdog").error(report.text)
        self._clean_up()
        if self._world.rank == 0:
            gone = () if report.alive else report.failed
            awaited = [rank for rank in range(self._world.size) if rank not in gone]
        else:
            awaited = [] if report.reporter is None else [report.reporter]
        _run_for(self._grace, lambda: self._end_after(awaited))
        if report.reporter is None:
            time.sleep(_SECONDS_TO_PRINT)
        os._exit(1)

    def _exit_without_store(self) -> None:
        """Ends the process when the ranks cannot communicate any more: each determines the reporter by itself."""
        self._exiting.acquire()
        failed = [0] if self._store.host_is_reachable(self._silence / 2) else self._store.ranks_on_host_of(0)
        if self._monitor.detector.reporter(failed) == self._world.rank:
            get_logger("Watchdog").error(f"{self._store.describe(failed)} gone; {RESUME_ADVICE}")
        self._clean_up()
        os._exit(1)

    def _end_after(self, ranks: list[int]) -> None:
        with suppress(dist.DistError):
            self._send_heartbeat(ended=True)
            self._store.wait_for_end(ranks, self._grace)

    def _clean_up(self) -> None:
        if self._before_exit is not None:
            _run_for(self._grace, self._before_exit)
        _run_for(self._silence, _flush)


def _run_for(seconds: float, work: Callable[[], None]) -> None:
    """Runs `work` in a thread and abandons it after `seconds`."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _may_follow_a_death(error: BaseException) -> bool:
    """Whether an error can come from a collective operation in which another rank has died."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)

"""Ends a job of several ranks, with one message, when one of them is killed, hangs, or loses its host.

Without it the others wait in a collective operation for a rank that is no more, each until its own timeout, and end
in as many tracebacks, none of which names the rank. Here every rank leaves a sign of life on a noticeboard and
looks for those of others, in a thread that takes part in no collective operation. Whoever misses one writes down a
finding, of which the board keeps the first; the rank that it names as speaker logs it, and all of them end.
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

from deepseek_v3.utils.distributed.failure_detector import AwakeClock, FailureDetector, Heartbeat
from deepseek_v3.utils.distributed.heartbeat_store import FailureReport, HeartbeatStore
from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.distributed.stack_probe import StackProbe
from deepseek_v3.utils.errors import error_chain
from deepseek_v3.utils.logging import get_logger

_BEATS_PER_SILENCE = 10
_SECONDS_TO_PRINT = 1.0  # that others stay for one that prints its own error: launchers end all after the first
_SECONDS_TO_END = 0.2  # between two looks of the rank with the store, which is the last to end
_ADVICE = "the job stops: resume with --resume latest"


class Watchdog:
    """While entered, ends this process with exit code 1 as soon as the job cannot go on; alone it does nothing.

    A rank that is silent for longer than `silence` is dead to the others, who count only the time in which they
    were running themselves: a job that is suspended and resumed goes on. One that stays in a step while others
    wait for it is named after nine tenths of `timeout`, the time of a collective operation, so that this comes
    before that operation's own error. Before a process ends, `before_exit` gets up to `grace` to finish what must
    not be torn, such as a checkpoint that is being written. The process ends even when its main thread hangs.

    An error that leaves the block on one rank ends all others, in silence: it is the one to be read, and SIGTERM is
    ignored from then on, so that no launcher ends the process before it has said it. An error that may be the echo
    of another rank's death is held back until that would have been found.

    Raises TrainingError, on entering, where ranks are missing after `timeout`.
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
        self._silence, self._hang = silence.total_seconds(), 0.9 * timeout.total_seconds()
        self._before_exit, self._grace = before_exit, grace.total_seconds()
        self._interval = self._silence / _BEATS_PER_SILENCE
        self._sightings = FailureDetector()
        self._awake = AwakeClock(longest=2 * self._interval)
        self._count = self._step = self._beats_unanswered = 0
        self._released, self._store_failed, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._leaving = threading.Lock()  # taken once, by the thread that ends the process

    def step(self, number: int) -> None:
        """Says that this rank enters a step; best called when its data is there, before it first meets others."""
        self._step = number

    def finish_first(self, work: Callable[[], None]) -> None:
        """Sets `before_exit`, for work that is known only later."""
        self._before_exit = work

    def __enter__(self) -> Watchdog:
        if self._world.is_alone:
            return self
        self._whereabouts = StackProbe(threading.get_ident())
        self._board = HeartbeatStore(self._world, self._timeout)
        self._talker = threading.Thread(target=self._talk_until_released, name="watchdog", daemon=True)
        self._talker.start()
        threading.Thread(target=self._guard_store, name="watchdog of the store", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.is_alone:
            return
        if error is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers end all after the first; this one must speak
        if any(_may_be_an_echo(cause) for cause in error_chain(error)):
            self._await_finding()
        self._released.set()
        self._talker.join()
        with suppress(dist.DistError):  # this rank's own end counts, whatever has become of the store
            if error is None:
                self._finish()
            else:
                self._fail()
        self._closed.set()

    def _await_finding(self) -> None:
        """Returns when the death of another rank would have been found, which would have ended this process."""
        end = self._awake.seconds + 1.5 * self._silence
        while self._awake.seconds < end:
            time.sleep(self._interval)

    def _finish(self) -> None:
        """Ends in good order; rank 0, with the store, stays and watches until nobody needs it any more."""
        self._board.set_beat(self._beat(ended=True))
        while self._world.rank == 0 and not self._board.have_ended(range(self._world.size)):
            time.sleep(min(self._interval, _SECONDS_TO_END))
            self._look()

    def _fail(self) -> None:
        """Lets all others end with this rank, whose error is about to be printed."""
        if not self._board.publish(FailureReport(lost=(self._world.rank,))):
            self._look()  # at the finding of another, which ends the process
        self._board.set_beat(self._beat(ended=True))
        while self._world.rank == 0 and self._others_live():
            time.sleep(min(self._interval, _SECONDS_TO_END))

    def _others_live(self) -> bool:
        """Whether any other rank neither has ended nor is silent."""
        now = self._awake.look(time.monotonic())
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        for rank, beat in zip(others, self._board.read(others)[1], strict=True):
            self._sightings.see(rank, beat, now)
        self._beats_unanswered = 0
        gone = self._sightings.silent(now, self._silence)
        return any(not self._sightings.has_ended(rank) and rank not in gone for rank in others)

    def _talk_until_released(self) -> None:
        try:
            while not self._released.wait(self._interval):
                self._board.set_beat(self._beat())
                self._look()
        except dist.DistError:
            self._store_failed.set()

    def _guard_store(self) -> None:
        """Ends the process when the store does not answer; another thread asks it, which it may keep for ever.

        Beats are counted, not seconds: a process that was stopped for a while must not think that the store was.
        """
        while not self._closed.is_set():
            self._store_failed.wait(self._interval)
            self._beats_unanswered += 1
            if self._store_failed.is_set() or self._beats_unanswered > _BEATS_PER_SILENCE:
                self._leave_without_store()

    def _beat(self, ended: bool = False) -> Heartbeat:
        place, waits = self._whereabouts.look(time.monotonic())
        self._count += 1
        return Heartbeat(self._count, self._step, waits, place, ended)

    def _look(self) -> None:
        """Looks for the signs of life of others, and acts on what is missing."""
        now = self._awake.look(time.monotonic())
        watched = self._sightings.to_look_at(self._world.rank, self._world.size, now, self._silence / 2)
        finding, beats = self._board.read(watched)
        self._beats_unanswered = 0
        if finding is not None:
            self._leave(finding)
        now = self._awake.look(time.monotonic())
        self._sightings.forget_all_but(watched)
        for rank, beat in zip(watched, beats, strict=True):
            self._sightings.see(rank, beat, now)
        self._judge(now)

    def _judge(self, now: float) -> None:
        """Reports who is silent or hangs; the next look at the board finds that, or an earlier finding."""
        silent = bool(self._sightings.silent(now, self._silence))
        if silent:
            lost = self._sightings.silent(now, 0.4 * self._silence)
            what = f"not answered for {self._silence:g} s"
        elif lost := self._sightings.hanging(now, self._hang):
            beat = self._sightings.beat_of(lost[0])
            what = f"not left step {beat.step} for {self._hang:g} s while others wait, and stands at {beat.place}"
        if lost:
            text = f"{self._board.described(lost)} {what}; {_ADVICE}"
            self._board.publish(FailureReport(tuple(lost), text, self._speaker(lost), alive=not silent))

    def _speaker(self, lost: list[int]) -> int | None:
        """The lowest rank that is left, as far as this one knows."""
        ranks = range(self._world.size)
        return next((rank for rank in ranks if rank not in lost and not self._sightings.has_ended(rank)), None)

    def _leave(self, finding: FailureReport) -> None:
        """Ends the process after whoever has something to say; rank 0, with the store, after all who read there."""
        self._leaving.acquire()
        if finding.speaker == self._world.rank:
            get_logger("Watchdog").error(finding.text)
        self._clean_up()
        if self._world.rank == 0:
            gone = () if finding.alive else finding.lost
            others = [rank for rank in range(self._world.size) if rank not in gone]
        else:
            others = [] if finding.speaker is None else [finding.speaker]
        self._within(self._grace, lambda: self._end_after(others))
        if finding.speaker is None:
            time.sleep(_SECONDS_TO_PRINT)
        os._exit(1)

    def _leave_without_store(self) -> None:
        """As `_leave`, for ranks that can no longer agree: each knows by itself who speaks."""
        self._leaving.acquire()
        lost = [0] if self._board.host_answers(self._silence / 2) else self._board.same_host(0)
        if self._speaker(lost) == self._world.rank:
            get_logger("Watchdog").error(f"{self._board.described(lost)} gone; {_ADVICE}")
        self._clean_up()
        os._exit(1)

    def _end_after(self, others: list[int]) -> None:
        with suppress(dist.DistError):
            self._board.set_beat(self._beat(ended=True))
            self._board.wait_for_end(others, self._grace)

    def _clean_up(self) -> None:
        if self._before_exit is not None:
            self._within(self._grace, self._before_exit)
        self._within(self._silence, _flush)

    @staticmethod
    def _within(seconds: float, work: Callable[[], None]) -> None:
        """Does some work in a thread of its own, and leaves it alone when it hangs."""
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(seconds)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _may_be_an_echo(error: BaseException) -> bool:
    """Whether an error can come from a collective operation whose other end has gone."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)

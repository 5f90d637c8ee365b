"""Detects, from the heartbeats of a job's ranks, which of them have died or hang.

Every rank watches others and measures by its own clock when it saw their state change; clocks of different hosts
are never compared. The clock stops while the process itself is suspended, so that a rank never mistakes its own
pause for the silence of the others. Nothing here reads the time, sleeps or ends a process: the clock is an
argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deepseek_v3.utils.distributed.heartbeat_store import FailureReport, Heartbeat, HeartbeatStore

HEARTBEATS_PER_SILENCE = 10
_WATCHED_RANKS = 32  # other ranks that each rank watches: enough that some watcher survives the loss of a few hosts
RESUME_ADVICE = "the job stops: resume with --resume latest"


class AwakeClock:
    """Counts the seconds in which this process was running, from successive readings of another clock.

    Between two readings at most `max_gap` seconds count: a process that was suspended, or starved on a busy
    machine, did not watch the other ranks for the rest of that time.
    """

    def __init__(self, max_gap: float) -> None:
        self.seconds = 0.0
        self._max_gap = max_gap
        self._last: float | None = None

    def advance(self, now: float) -> float:
        """Returns the seconds so far; `now` is the other clock's time in seconds."""
        if self._last is not None:
            self.seconds += min(now - self._last, self._max_gap)
        self._last = now
        return self.seconds


@dataclass(frozen=True)
class RankState:
    """A rank's latest heartbeat, and when this process first saw its count and its step, in seconds."""

    heartbeat: Heartbeat
    heartbeat_at: float
    step_at: float


class FailureDetector:
    """Decides which ranks have died or hang, from what one rank has observed of the others.

    Rank `rank` of `size` observes. A rank that sends no new heartbeat for longer than `silence` seconds has died.
    All times are in seconds of one clock.
    """

    def __init__(self, rank: int, size: int, silence: float, hang: float) -> None:
        self.rank, self.size, self.silence, self.hang = rank, size, silence, hang
        self._states: dict[int, RankState] = {}

    def observe(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Records the heartbeat that the store holds for a rank at `now`, whether it is new or not."""
        previous = self._states.get(rank)
        if previous is None:
            self._states[rank] = RankState(heartbeat, now, now)
            return
        heartbeat_at = previous.heartbeat_at if heartbeat.count == previous.heartbeat.count else now
        step_at = previous.step_at if heartbeat.step == previous.heartbeat.step else now
        self._states[rank] = RankState(heartbeat, heartbeat_at, step_at)

    def ranks_to_watch(self, now: float) -> list[int]:
        """This rank and the next 32; all ranks while one has been silent for half of `silence`.

        The other ranks are then watched too, in order to report all that die at the same time.
        """
        if self.silent(now, self.silence / 2):
            return list(range(self.size))
        return [(self.rank + distance) % self.size for distance in range(min(self.size, _WATCHED_RANKS + 1))]

    def forget_all_except(self, ranks: Iterable[int]) -> None:
        """Drops the states of ranks that are not watched any more, which would seem silent later."""
        watched = set(ranks)
        self._states = {rank: state for rank, state in self._states.items() if rank in watched}

    def has_ended(self, rank: int) -> bool:
        """Whether a rank is known to have ended."""
        return rank in self._states and self._states[rank].heartbeat.ended

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks that have not ended and have sent no new heartbeat for longer than `seconds`."""
        return [rank for rank, state in self._running() if now - state.heartbeat_at > seconds]

    def hanging(self, now: float) -> list[int]:
        """Ranks that the others wait for: only these have stayed in their step for longer than `hang` seconds.

        They are either in an earlier step than others; or in the same step, while another rank has waited in one
        collective operation for that long and they have not joined it. If all ranks wait, none can be blamed.
        """
        running = self._running()
        stuck = [(rank, state) for rank, state in running if now - state.step_at > self.hang]
        newest = max((state.heartbeat.step for _, state in running), default=0)
        oldest = min((state.heartbeat.step for _, state in stuck), default=newest)
        if oldest < newest:
            return [rank for rank, state in stuck if state.heartbeat.step == oldest]
        if len(stuck) < len(running) or all(state.heartbeat.waiting_seconds <= self.hang for _, state in stuck):
            return []
        return [rank for rank, state in stuck if state.heartbeat.waiting_seconds == 0]

    def failure(self, now: float, describe: Callable[[list[int]], str]) -> FailureReport | None:
        """The report on the ranks that have died or hang; None if no rank has failed.

        `describe` names ranks as `HeartbeatStore.describe` does. If one rank has died, those that have been silent
        for 0.4 of `silence` are reported with it: they are likely to have died at the same time.
        """
        if self.silent(now, self.silence):
            dead = self.silent(now, 0.4 * self.silence)
            return self._report(dead, f"{describe(dead)} not answered for {self.silence:g} s", alive=False)
        if hanging := self.hanging(now):
            heartbeat = self._states[hanging[0]].heartbeat
            text = (
                f"{describe(hanging)} not left step {heartbeat.step} for {self.hang:g} s while others wait, "
                f"and is at {heartbeat.location}"
            )
            return self._report(hanging, text, alive=True)
        return None

    def reporter(self, failed: Iterable[int]) -> int | None:
        """The rank that logs the report: the lowest that has not failed and is not known to have ended."""
        gone = set(failed)
        return next((rank for rank in range(self.size) if rank not in gone and not self.has_ended(rank)), None)

    def _report(self, failed: list[int], text: str, *, alive: bool) -> FailureReport:
        return FailureReport(tuple(failed), f"{text}; {RESUME_ADVICE}", self.reporter(failed), alive)

    def _running(self) -> list[tuple[int, RankState]]:
        return [(rank, state) for rank, state in sorted(self._states.items()) if not state.heartbeat.ended]


class RankMonitor:
    """Sends the heartbeats of one rank, and checks those of the others, once per heartbeat interval.

    `time` returns the time in seconds; `silence` and `hang` are as in `FailureDetector`. Each method is one
    exchange with the store and never waits, so a test can drive any number of ranks with a fake clock and one
    HashStore.
    """

    def __init__(self, store: HeartbeatStore, silence: float, hang: float, time: Callable[[], float]) -> None:
        self.store, self._time = store, time
        self.detector = FailureDetector(store.rank, store.size, silence, hang)
        self.interval = silence / HEARTBEATS_PER_SILENCE
        self.clock = AwakeClock(max_gap=2 * self.interval)
        self.answers = 0  # how often the store has answered
        self._count = 0

    def send(self, step: int, location: str, waiting_seconds: float, *, ended: bool = False) -> None:
        """Publishes this rank's next heartbeat."""
        self._count += 1
        self.store.publish_heartbeat(Heartbeat(self._count, step, waiting_seconds, location, ended))

    def check(self) -> FailureReport | None:
        """Returns the job's failure report if there is one.

        Otherwise records the heartbeats of the watched ranks, and publishes a report if one of them has failed; the
        next check returns that report, or the one that another rank published first.
        """
        watched = self.detector.ranks_to_watch(self._now())
        report, heartbeats = self.store.read(watched)
        self.answers += 1
        if report is not None:
            return report
        now = self._now()
        self.detector.forget_all_except(watched)
        self._observe(watched, heartbeats, now)
        failure = self.detector.failure(now, self.store.describe)
        if failure is not None:
            self.store.publish_report(failure)
        return None

    def others_are_running(self) -> bool:
        """Whether any other rank has neither ended nor fallen silent."""
        now = self._now()
        others = [rank for rank in range(self.store.size) if rank != self.store.rank]
        self._observe(others, self.store.read(others)[1], now)
        self.answers += 1
        silent = self.detector.silent(now, self.detector.silence)
        return any(not self.detector.has_ended(rank) and rank not in silent for rank in others)

    def _observe(self, ranks: list[int], heartbeats: list[Heartbeat], now: float) -> None:
        for rank, heartbeat in zip(ranks, heartbeats, strict=True):
            self.detector.observe(rank, heartbeat, now)

    def _now(self) -> float:
        return self.clock.advance(self._time())

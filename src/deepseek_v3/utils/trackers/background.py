"""Runs a tracker on a thread of its own, so that it can neither stop nor slow a run.

Records wait in a bounded queue. When the queue is full, or the tracker has failed to start, they are dropped and
counted; metrics.jsonl has them all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from deepseek_v3.utils.interrupts import exit_may_hang
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.redaction import redact_environment
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Tracker, Values, scalars

_log = get_logger("Trackers")

QUEUE_RECORDS = 4096
_LONGEST_MESSAGE = 400  # characters of an error of a library


class BackgroundTracker:
    """One tracker of one run. No method waits, except `wait`, and none raises.

    `name` is the one of `logging.trackers`. `on_start` is called on the tracker's thread, once the run there has
    started. The first error of each method is logged, later ones are counted.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        on_start: Callable[[RemoteRun], None],
        capacity: int = QUEUE_RECORDS,
    ) -> None:
        self.name, self._tracker, self._run, self._on_start = name, tracker, run, on_start
        self._capacity = capacity
        self._queue: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._status: Status | None = None
        self._remote: RemoteRun | None = None
        self._phase = "start"
        self._has_failed = False  # to start
        self._is_abandoned = False  # what happens from then on is not reported
        self._records = self._dropped = self._failed = 0
        self._reported: set[str] = set()
        exit_may_hang.set()
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def log_scalars(self, step: int, values: Values) -> None:
        """Queues the metrics of a step; lists have one value per layer."""
        own = dict(values)
        self._put(lambda: self._tracker.log_scalars(step, scalars(own)))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Queues a text."""
        self._put(lambda: self._tracker.log_text(step, name, text))

    def close(self, status: Status) -> None:
        """Lets the thread send what is queued and finish the run; `wait` waits for that."""
        with self._changed:
            self._status = self._status or status
            self._changed.notify()

    def wait(self, deadline: float) -> None:
        """Waits until the run there is finished, or until `time.monotonic()` is `deadline`; logs the outcome."""
        ended = self._ended.wait(max(0.0, deadline - time.monotonic()))
        with self._changed:
            missing = self._dropped + self._failed + (0 if ended else len(self._queue))
            records, phase, remote = self._records, self._phase, self._remote
            self._is_abandoned = not ended
        place = f"; {remote.place}" if remote else ""
        if not ended:
            _log.warning(f"{self.name}: its {phase} takes too long; the run ends without it{place}")
        if missing:
            _log.warning(
                f"{self.name}: {missing:,} of {records:,} records are missing there; metrics.jsonl has them all"
            )
        if ended and remote:
            _log.info(f"{self.name}: {remote.place}")

    def _put(self, send: Callable[[], None]) -> None:
        with self._changed:
            self._records += 1
            if self._has_failed or len(self._queue) >= self._capacity:
                self._dropped += 1
            else:
                self._queue.append(send)
                self._changed.notify()

    def _work(self) -> None:
        try:
            if not self._attempt("start", self._start):
                self._give_up()
                return
            while (send := self._next()) is not None:
                if not self._attempt("log", send):
                    self._failed += 1
            status = self._status
            assert status is not None
            self._attempt("finish", lambda: self._tracker.finish(status))
        finally:
            self._ended.set()

    def _next(self) -> Callable[[], None] | None:
        """Waits for the next record; None after the last one, once the run is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._status is not None)
            return self._queue.popleft() if self._queue else None

    def _start(self) -> None:
        remote = self._tracker.start(self._run)
        _log.info(f"{self.name}: {remote.place}")
        if self._run.previous is not None and not remote.continued:
            _log.warning(
                f"{self.name}: cannot continue the run {self._run.previous.id} of the project "
                f"{self._run.previous.project}; {remote.id} of {remote.project} holds the steps from here on"
            )
        with self._changed:
            self._remote = remote
        self._on_start(remote)

    def _give_up(self) -> None:
        with self._changed:
            self._has_failed = True
            self._dropped += len(self._queue)
            self._queue.clear()

    def _attempt(self, phase: str, action: Callable[[], None]) -> bool:
        """Calls the tracker; logs its first error in each phase. Returns whether it succeeded."""
        self._phase = phase
        try:
            action()
        except BaseException as error:  # noqa: BLE001 -- a library may even raise SystemExit, which ends a thread silently
            if phase not in self._reported and not self._is_abandoned:
                self._reported.add(phase)
                _log.warning(
                    f"{self.name}: {phase} failed: {_describe(error)}; training continues, see metrics.jsonl"
                )
            return False
        return True


def _describe(error: BaseException) -> str:
    """The kind and message of a library's error in one line, without secrets of the environment."""
    message = " ".join(redact_environment(str(error)).split())
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__

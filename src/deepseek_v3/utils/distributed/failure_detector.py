"""What the ranks of a job tell each other about themselves, and how one that is dead or hangs is known by it.

No rank trusts another's clock: it notes by its own when it saw something change. That clock stands still while the
process itself does, so that nobody takes its own pause for the silence of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

_WATCHED = 32  # others that each rank looks after: enough that the loss of a few hosts leaves somebody who does


@dataclass(frozen=True)
class Heartbeat:
    """One message of a rank.

    `count` rises with every message. `step` is the step that the rank is in, 0 before its first; `waits` is for how
    many seconds its main thread has stood in one and the same collective operation, and `place` the line of code
    where that thread is. After `ended` nothing more is to be expected.
    """

    count: int = 0
    step: int = 0
    waits: float = 0.0
    place: str = ""
    ended: bool = False

    def encode(self) -> str:
        """As text, for a key-value store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Heartbeat:
        """The inverse of `encode`."""
        return cls(**json.loads(text))


class AwakeClock:
    """Seconds in which this process was running, from its own looks at a clock.

    Between two looks no more than `longest` seconds count: a process that was suspended, or that a busy machine
    kept waiting, has not watched anybody for the rest of that time.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = 0.0
        self._longest = longest
        self._last: float | None = None

    def look(self, now: float) -> float:
        """The seconds so far; `now` is the clock's time in seconds."""
        if self._last is not None:
            self.seconds += min(now - self._last, self._longest)
        self._last = now
        return self.seconds


@dataclass(frozen=True)
class RankState:
    """A rank's last message; when a newer one was last seen and when its step last changed, by our own clock."""

    beat: Heartbeat
    beat_at: float
    step_at: float


class FailureDetector:
    """What one rank has seen of the others; times in seconds, of one clock."""

    def __init__(self) -> None:
        self._seen: dict[int, RankState] = {}

    def see(self, rank: int, beat: Heartbeat, now: float) -> None:
        """Takes note of the message that lies there for a rank now, be it new or not."""
        earlier = self._seen.get(rank)
        if earlier is None:
            self._seen[rank] = RankState(beat, now, now)
            return
        beat_at = earlier.beat_at if beat.count == earlier.beat.count else now
        step_at = earlier.step_at if beat.step == earlier.beat.step else now
        self._seen[rank] = RankState(beat, beat_at, step_at)

    def to_look_at(self, rank: int, size: int, now: float, seconds: float) -> list[int]:
        """Ranks from our own on; all, to know who else is, while one has been silent for longer than `seconds`."""
        if self.silent(now, seconds):
            return list(range(size))
        return [(rank + distance) % size for distance in range(min(size, _WATCHED + 1))]

    def forget_all_but(self, ranks: Iterable[int]) -> None:
        """Drops ranks that are no longer looked at, whose messages would seem old."""
        kept = set(ranks)
        self._seen = {rank: sighting for rank, sighting in self._seen.items() if rank in kept}

    def beat_of(self, rank: int) -> Heartbeat:
        """The last message of a rank."""
        return self._seen[rank].beat

    def has_ended(self, rank: int) -> bool:
        """Whether a rank is known to have ended."""
        return rank in self._seen and self._seen[rank].beat.ended

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks that have not ended and sent nothing new for longer than `seconds`."""
        return [rank for rank, sighting in self._running() if now - sighting.beat_at > seconds]

    def hanging(self, now: float, seconds: float) -> list[int]:
        """Ranks that all others wait for: they alone have not moved on for longer than `seconds`.

        Either they are in an earlier step than others, or in the same one, where another rank has waited in one
        collective operation for so long and they have not joined it. Where all wait, nobody can be blamed.
        """
        running = self._running()
        stuck = [(rank, sighting) for rank, sighting in running if now - sighting.step_at > seconds]
        newest = max((sighting.beat.step for _, sighting in running), default=0)
        oldest = min((sighting.beat.step for _, sighting in stuck), default=newest)
        if oldest < newest:
            return [rank for rank, sighting in stuck if sighting.beat.step == oldest]
        if len(stuck) < len(running) or all(sighting.beat.waits <= seconds for _, sighting in stuck):
            return []
        return [rank for rank, sighting in stuck if sighting.beat.waits == 0]

    def _running(self) -> list[tuple[int, RankState]]:
        return [(rank, sighting) for rank, sighting in sorted(self._seen.items()) if not sighting.beat.ended]

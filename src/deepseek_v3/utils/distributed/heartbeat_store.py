"""What the ranks of a job let each other know through a store, without any collective operation.

The store lives in rank 0 and is not the job's own: that one may live in a launcher's process, which ends as soon as
one of its ranks has died, before anybody could say which.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not said to be so

from deepseek_v3.utils.distributed.failure_detector import Heartbeat
from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.errors import TrainingError

_PLACE, _FINDING, _NOTHING = "watchdog", "finding", "-"


@dataclass(frozen=True)
class FailureReport:
    """Why the job ends: `lost` ranks answer no more, or nobody waits for them; `speaker` is to say `text`.

    Without a speaker there is nothing to say: a lost rank says it itself. One that only hangs is `alive`: it too
    will come to read this.
    """

    lost: tuple[int, ...]
    text: str = ""
    speaker: int | None = None
    alive: bool = False


class HeartbeatStore:
    """One rank's connection to the store; for one thread at a time, which a store that is frozen keeps for ever.

    Every method raises torch.distributed.DistError where the store has gone.
    """

    def __init__(self, world: World, timeout: timedelta) -> None:
        """Tells all ranks who this one is, and waits until all have done so.

        Raises TrainingError, with the ranks that are missing, after `timeout`.
        """
        self.rank, self.size = world.rank, world.size
        self._store = _rank_0s_store(world, timeout)
        if self.rank == 0:
            self._store.set(_FINDING, _NOTHING)
        self.set_beat(Heartbeat())
        self._store.set(_name_key(self.rank), f"host {socket.gethostname()}, pid {os.getpid()}")
        keys = [_name_key(rank) for rank in range(self.size)]
        try:
            self._names = [name.decode() for name in self._store.multi_get(keys)]
        except dist.DistError as error:
            missing = [f"rank {rank}" for rank, key in enumerate(keys) if not self._store.check([key])]
            raise TrainingError(
                f"of {self.size} ranks, {_listed(missing)} did not start within {timeout.total_seconds():g} s; "
                "see what they printed"
            ) from error

    def described(self, ranks: Sequence[int]) -> str:
        """`rank 3 (host h, pid 7) has`, to be continued."""
        names = [f"rank {rank} ({self._names[rank]})" for rank in ranks]
        return f"{_listed(names)} {'has' if len(ranks) == 1 else 'have'}"

    def host_answers(self, seconds: float) -> bool:
        """Whether the host of the store lives: it takes, or refuses, another connection."""
        try:
            socket.create_connection((self._store.host, self._store.port), seconds).close()
        except ConnectionRefusedError:
            pass
        except OSError:
            return False
        return True

    def same_host(self, rank: int) -> list[int]:
        """All ranks on the host of one of them, this one included."""
        host = self._names[rank].partition(", pid ")[0]
        return [other for other, name in enumerate(self._names) if name.partition(", pid ")[0] == host]

    def set_beat(self, beat: Heartbeat) -> None:
        """Leaves this rank's latest message."""
        self._store.set(_beat_key(self.rank), beat.encode())

    def read(self, ranks: Sequence[int]) -> tuple[FailureReport | None, list[Heartbeat]]:
        """The finding, where there is one, and the latest messages of these ranks."""
        finding, *beats = self._store.multi_get([_FINDING, *map(_beat_key, ranks)])
        return _decoded(finding), [Heartbeat.decode(beat) for beat in beats]

    def publish(self, finding: FailureReport) -> bool:
        """Writes down a finding, where there is none yet; returns whether it is the one that counts."""
        text = json.dumps(asdict(finding))
        return self._store.compare_set(_FINDING, _NOTHING, text).decode() == text

    def wait_for_end(self, ranks: Sequence[int], seconds: float) -> None:
        """Waits until these ranks have ended, or for so long."""
        deadline = time.monotonic() + seconds
        while not self.have_ended(ranks) and time.monotonic() < deadline:
            time.sleep(0.05)

    def have_ended(self, ranks: Sequence[int]) -> bool:
        """Whether nothing more is to be expected of any of these ranks."""
        return all(beat.ended for beat in self.read(ranks)[1])


def _rank_0s_store(world: World, timeout: timedelta) -> TCPStore:
    """A connection to the store in rank 0, at a free port of the address by which it reaches the job's store."""
    job = world.connect(timeout)
    if world.rank == 0:
        with socket.create_connection((job.host, job.port), timeout.total_seconds()) as connection:
            address = connection.getsockname()[0]
        store = TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        job.set(_PLACE, f"{address} {store.port}")
        return store
    address, port = job.get(_PLACE).decode().split()
    return TCPStore(address, int(port), timeout=timeout)


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _name_key(rank: int) -> str:
    return f"name/{rank}"


def _decoded(finding: bytes) -> FailureReport | None:
    if finding.decode() == _NOTHING:
        return None
    fields = json.loads(finding)
    return FailureReport(tuple(fields["lost"]), fields["text"], fields["speaker"], fields["alive"])


def _listed(names: list[str], most: int = 8) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return " and ".join([", ".join(names[:most]), *more])

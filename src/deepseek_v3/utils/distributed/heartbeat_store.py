"""Heartbeats and the failure report of a job, exchanged through a key-value store without collective operations.

A real job uses a separate TCPStore in rank 0. The store through which the ranks rendezvous is not used: it may be
in a launcher's process, which ends as soon as one of its ranks dies, before any rank could report why.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but not exported

from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.errors import TrainingError

_ADDRESS_KEY, _REPORT_KEY, _NO_REPORT = "watchdog", "report", "-"
_POLL_SECONDS = 0.05
_MAX_NAMED_RANKS = 8


@dataclass(frozen=True)
class Heartbeat:
    """The latest state of a rank, as it publishes it.

    `count` rises with every heartbeat. `step` is the training step that the rank is in, 0 before the first.
    `waiting_seconds` is how long its main thread has been in one and the same collective operation, and `location`
    the `file:line` at which that thread is. After a heartbeat with `ended` the rank sends no other.
    """

    count: int = 0
    step: int = 0
    waiting_seconds: float = 0.0
    location: str = ""
    ended: bool = False

    def encode(self) -> str:
        """The heartbeat as text for a key-value store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Heartbeat:
        """The inverse of `encode`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class FailureReport:
    """Why the job ends. There is one report in a job: the first that any rank publishes.

    The ranks in `failed` have died, or hang, or raised an error. The rank `reporter` logs `text`; without a
    reporter there is nothing to log, because the failed rank prints its own error. With `alive` the failed ranks
    only hang: their watchdog threads still run and will read this report.
    """

    failed: tuple[int, ...]
    text: str = ""
    reporter: int | None = None
    alive: bool = False

    def encode(self) -> str:
        """The report as text for a key-value store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> FailureReport:
        """The inverse of `encode`."""
        fields = json.loads(text)
        return cls(**{**fields, "failed": tuple(fields["failed"])})


class HeartbeatStore:
    """One rank's view of the store that all ranks of a job share.

    Use an instance in one thread at a time: a store that does not answer blocks that thread for ever. Every method
    that uses the store raises torch.distributed.DistError if the store has ended. Any torch.distributed store will
    do; tests use a HashStore, which is in memory.
    """

    def __init__(self, rank: int, size: int, store: Store) -> None:
        """Publishes this rank's name and first heartbeat in `store`; `size` is the number of ranks."""
        self.rank, self.size, self._store = rank, size, store
        self._names: list[str] = []
        if rank == 0:
            store.set(_REPORT_KEY, _NO_REPORT)
        self.publish_heartbeat(Heartbeat())
        store.set(_name_key(rank), f"host {socket.gethostname()}, pid {os.getpid()}")

    @classmethod
    def connect(cls, world: World, timeout: timedelta) -> HeartbeatStore:
        """Creates the store in rank 0, connects every rank to it, and waits for all of them.

        Raises TrainingError, naming the missing ranks, after `timeout`.
        """
        store = cls(world.rank, world.size, _connect_to_rank_0(world, timeout))
        store.wait_for_all_ranks(timeout)
        return store

    def wait_for_all_ranks(self, timeout: timedelta) -> None:
        """Waits until every rank has published its name, for as long as the store's own timeout.

        Raises TrainingError, naming the missing ranks; the message gives `timeout` as the time waited.
        """
        keys = [_name_key(rank) for rank in range(self.size)]
        try:
            self._names = [name.decode() for name in self._store.multi_get(keys)]
        except dist.DistError as error:
            missing = [f"rank {rank}" for rank, key in enumerate(keys) if not self._store.check([key])]
            raise TrainingError(
                f"of {self.size} ranks, {_enumeration(missing)} did not start within "
                f"{timeout.total_seconds():g} s; see what they printed"
            ) from error

    def describe(self, ranks: Sequence[int]) -> str:
        """The subject of a sentence about these ranks, with its verb: `rank 3 (host h, pid 7) has`."""
        names = [f"rank {rank} ({self._names[rank]})" for rank in ranks]
        return f"{_enumeration(names)} {'has' if len(ranks) == 1 else 'have'}"

    def host_is_reachable(self, seconds: float) -> bool:
        """Whether the host of a TCPStore accepts or refuses another connection within this time."""
        assert isinstance(self._store, TCPStore)
        try:
            socket.create_connection((self._store.host, self._store.port), seconds).close()
        except ConnectionRefusedError:
            pass
        except OSError:
            return False
        return True

    def ranks_on_host_of(self, rank: int) -> list[int]:
        """All ranks on the host of `rank`, `rank` included."""
        host = self._names[rank].partition(", pid ")[0]
        return [other for other, name in enumerate(self._names) if name.partition(", pid ")[0] == host]

    def publish_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replaces this rank's heartbeat."""
        self._store.set(_heartbeat_key(self.rank), heartbeat.encode())

    def read(self, ranks: Iterable[int]) -> tuple[FailureReport | None, list[Heartbeat]]:
        """The failure report, if there is one, and the latest heartbeats of `ranks`, in their order."""
        report, *heartbeats = self._store.multi_get([_REPORT_KEY, *map(_heartbeat_key, ranks)])
        return (
            None if report.decode() == _NO_REPORT else FailureReport.decode(report),
            [Heartbeat.decode(heartbeat) for heartbeat in heartbeats],
        )

    def publish_report(self, report: FailureReport) -> bool:
        """Publishes a failure report unless there is one already; returns whether this one is the job's report."""
        text = report.encode()
        return self._store.compare_set(_REPORT_KEY, _NO_REPORT, text).decode() == text

    def have_ended(self, ranks: Iterable[int]) -> bool:
        """Whether all these ranks have ended."""
        return all(heartbeat.ended for heartbeat in self.read(ranks)[1])

    def wait_for_end(self, ranks: Sequence[int], seconds: float) -> None:
        """Waits until all these ranks have ended, but no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.have_ended(ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _connect_to_rank_0(world: World, timeout: timedelta) -> TCPStore:
    """Connects to the store, which rank 0 hosts at the address by which it reaches the rendezvous store."""
    rendezvous = world.connect(timeout)
    if world.rank == 0:
        with socket.create_connection((rendezvous.host, rendezvous.port), timeout.total_seconds()) as connection:
            address = connection.getsockname()[0]
        store = TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        rendezvous.set(_ADDRESS_KEY, f"{address} {store.port}")
        return store
    address, port = rendezvous.get(_ADDRESS_KEY).decode().split()
    return TCPStore(address, int(port), timeout=timeout)


def _heartbeat_key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _name_key(rank: int) -> str:
    return f"name/{rank}"


def _enumeration(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED_RANKS
    return " and ".join([", ".join(names[:_MAX_NAMED_RANKS]), *([f"{more} more"] if more > 0 else [])])

"""Failures of simulated ranks: one in-memory store, one fake clock, no process and no sleep."""

import re
from collections.abc import Iterable
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from deepseek_v3.utils.distributed.failure_detector import RankMonitor
from deepseek_v3.utils.distributed.heartbeat_store import FailureReport, HeartbeatStore
from deepseek_v3.utils.errors import TrainingError

SILENCE, HANG = 10.0, 60.0


class SimulatedJob:
    """Ranks that send heartbeats to one store and check those of others, each time the clock is advanced."""

    def __init__(self, size: int) -> None:
        self.now = 0.0
        store = HashStore()
        self.stores = [HeartbeatStore(rank, size, store) for rank in range(size)]
        for rank_store in self.stores:
            rank_store.wait_for_all_ranks(timedelta(seconds=1))
        self.monitors = [RankMonitor(each, SILENCE, HANG, lambda: self.now) for each in self.stores]
        self.steps = [1] * size
        self.waiting = [0.0] * size

    def run(self, seconds: float, alive: Iterable[int]) -> dict[int, FailureReport]:
        """Advances the clock, heartbeat by heartbeat, for the `alive` ranks; returns the reports that they find."""
        alive = list(alive)
        end = self.now + seconds
        while self.now < end:
            self.now += SILENCE / 10
            for rank in alive:
                self.monitors[rank].send(self.steps[rank], "loader.py:7", self.waiting[rank])
            reports = {rank: report for rank in alive if (report := self.monitors[rank].check())}
            if reports:
                return {rank: report for rank in alive if (report := self.monitors[rank].check())}
        return {}


def test_healthy_ranks_find_no_failure() -> None:
    assert SimulatedJob(4).run(10 * SILENCE, alive=range(4)) == {}


@pytest.mark.parametrize("dead", [[1], [0], [1, 3], [0, 1, 2]])
def test_ranks_that_died_are_reported_by_the_lowest_alive(dead: list[int]) -> None:
    job = SimulatedJob(4)
    job.run(2, alive=range(4))
    alive = [rank for rank in range(4) if rank not in dead]
    reports = job.run(2 * SILENCE, alive)
    assert list(reports) == alive
    report = reports[alive[0]]
    assert set(reports.values()) == {report}
    assert (report.failed, report.reporter, report.alive) == (tuple(dead), alive[0], False)
    verb = "has" if len(dead) == 1 else "have"
    names = ", ".join(rf"rank {rank} \(host [^ ]+, pid \d+\)" for rank in dead)
    expected = rf"{names} {verb} not answered for 10 s; the job stops: resume with --resume latest"
    assert re.fullmatch(expected, report.text), report.text


def test_a_rank_behind_the_others_is_reported_as_alive() -> None:
    job = SimulatedJob(3)
    job.steps = [5, 4, 5]
    assert job.run(HANG - 1, alive=range(3)) == {}
    report = job.run(SILENCE, alive=range(3))[2]
    assert (report.failed, report.reporter, report.alive) == ((1,), 0, True)
    assert "has not left step 4 for 60 s while others wait, and is at loader.py:7; the job stops" in report.text


@pytest.mark.parametrize(("size", "culprit", "step"), [(2, 1, 3), (4, 0, 1), (3, 2, 4)])
def test_a_rank_that_others_wait_for_is_reported(size: int, culprit: int, step: int) -> None:
    job = SimulatedJob(size)
    job.steps = [step] * size
    job.run(HANG, alive=range(size))
    job.waiting = [0.0 if rank == culprit else HANG + 1 for rank in range(size)]
    reports = job.run(SILENCE, alive=range(size))
    assert list(reports) == list(range(size))
    report = reports[culprit]
    assert (report.failed, report.reporter, report.alive) == ((culprit,), int(culprit == 0), True)
    assert f"has not left step {step} for 60 s while others wait, and is at loader.py:7" in report.text


@pytest.mark.parametrize("last", [0, 2])
def test_ranks_that_have_ended_are_not_missed(last: int) -> None:
    job = SimulatedJob(3)
    for rank in {0, 1, 2} - {last}:
        job.monitors[rank].send(4, "", 0.0, ended=True)
    assert job.run(HANG + SILENCE, alive=[last]) == {}


def test_a_rank_that_has_ended_does_not_report_others() -> None:
    job = SimulatedJob(3)
    job.run(2, alive=range(3))
    job.monitors[1].send(1, "", 0.0, ended=True)
    report = job.run(2 * SILENCE, alive=[2])[2]
    assert (report.failed, report.reporter) == ((0,), 2)


def test_a_suspended_job_goes_on() -> None:
    job = SimulatedJob(3)
    job.run(5, alive=range(3))
    job.now += 10_000
    assert job.run(2 * SILENCE, alive=range(3)) == {}


def test_the_first_report_of_a_job_counts() -> None:
    job = SimulatedJob(3)
    assert job.stores[1].publish_report(FailureReport(failed=(1,)))
    assert not job.stores[2].publish_report(FailureReport(failed=(2,), text="later", reporter=0))
    assert job.run(1, alive=[0, 2]) == {0: FailureReport((1,)), 2: FailureReport((1,))}


def test_rank_0_waits_until_the_others_have_ended_or_are_silent() -> None:
    job = SimulatedJob(3)
    assert job.monitors[0].others_are_running()
    job.monitors[1].send(1, "", 0.0, ended=True)
    assert job.monitors[0].others_are_running()
    for _ in range(20):
        job.now += 1
        running = job.monitors[0].others_are_running()
    assert not running


def test_missing_ranks_are_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(TrainingError, match=r"of 3 ranks, rank 0, rank 2 did not start within 0\.1 s"):
        HeartbeatStore(1, 3, store).wait_for_all_ranks(timedelta(seconds=0.1))

"""Real ranks that are killed, stopped, hang, fail or end; what all of them print, and how they exit."""

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepseek_v3.utils.distributed.launch import ALONE, World, process_group
from deepseek_v3.utils.distributed.watchdog import Watchdog
from deepseek_v3.utils.errors import DataError
from helpers.jobs import HANGS, Job

SILENCE = timedelta(seconds=2.5)
PATIENT, HASTY = timedelta(seconds=2 * HANGS), timedelta(seconds=5)  # where a timeout must not, or must, matter
RESUME = "; the job stops: resume with --resume latest"

Deed = Callable[[int, int], None]  # what a rank does in a step, given both numbers


def _work(
    world: World, deed: Deed, timeout: timedelta = PATIENT, saved: Path | None = None, drowsy: int | None = None
) -> None:
    """Four steps with a sum over all ranks in each, and a slow save where the watchdog ends the process.

    A `drowsy` rank looks at the others, and is seen, four times more seldom.
    """

    def save() -> None:
        assert saved is not None
        time.sleep(0.3)
        (saved / f"saved_{world.rank}").touch()

    before_exit = save if saved else None
    silence = 4 * SILENCE if world.rank == drowsy else SILENCE
    with (
        process_group(world, torch.device("cpu"), PATIENT),
        Watchdog(world, timeout, silence=silence, before_exit=before_exit) as watchdog,
    ):
        for step in range(1, 5):
            watchdog.step(step)
            deed(world.rank, step)
            dist.all_reduce(torch.ones(8))
        deed(world.rank, 5)


def _kill(rank: int, step: int, *, victims: tuple[int, ...], number: int = signal.SIGKILL) -> None:
    if rank in victims and step == 3:
        dist.all_reduce(torch.ones(1 << 20), async_op=True)
        os.kill(os.getpid(), number)
    if step == 3:
        dist.all_reduce(torch.ones(1 << 20))


def _kill_with_launcher(rank: int, step: int, *, launcher: Path) -> None:
    """As where a launcher ends as soon as one of its ranks has died."""
    if rank == 1 and step == 3:
        os.kill(int((launcher / "launcher").read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _hang(rank: int, step: int, *, culprit: int, where: int) -> None:
    if rank == culprit and step == where:
        time.sleep(2 * HANGS)


def _fail(rank: int, step: int, *, error: Exception, failing: int = 1) -> None:
    if rank == failing and step == 3:
        raise error


def _fail_everywhere(rank: int, step: int) -> None:
    if step == 3:
        raise DataError("no tokens")


def _end_one_after_another(rank: int, step: int, *, last: int, seconds: float = 4.0) -> None:
    if rank == last and step == 5:
        time.sleep(seconds)


def _stay_until_killed(world: World, seen: Path) -> None:
    """Rank 1 ends at once; rank 2 says when it knows."""
    with process_group(world, torch.device("cpu"), PATIENT), Watchdog(world, PATIENT, silence=SILENCE) as watchdog:
        watchdog.step(1)
        while world.rank == 2 and not watchdog._monitor.detector.has_ended(1):
            time.sleep(0.01)
        if world.rank == 2:
            seen.touch()
        if world.rank != 1:
            time.sleep(2 * HANGS)


def _ignores(number: signal.Signals, pid: int | None) -> bool:
    """Whether a process ignores a signal."""
    (mask,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def _name(job: Job, rank: int) -> str:
    return rf"rank {rank} \(host [^ ]+, pid {job.ranks[rank].pid}\)"


def _assert_one_line(line_pattern: str, lines: list[str]) -> None:
    assert len(lines) == 1, lines
    assert re.fullmatch(rf"\[Watchdog\] error: {line_pattern}{RESUME}", lines[0]), lines[0]


@pytest.mark.parametrize(("size", "victim", "launcher"), [(2, 1, False), (4, 2, True)])
def test_a_rank_killed_in_mid_step_is_named(tmp_path: Path, size: int, victim: int, launcher: bool) -> None:
    job = Job(tmp_path, size, partial(_work, deed=partial(_kill, victims=(victim,))), launcher=launcher)
    outcome = job.outcome()
    assert outcome.codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(size)]
    _assert_one_line(f"{_name(job, victim)} has not answered for 2.5 s", outcome.lines)


def test_several_ranks_killed_at_once_are_named_together(tmp_path: Path) -> None:
    job = Job(tmp_path, 4, partial(_work, deed=partial(_kill, victims=(1, 3))))
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL, 1, -signal.SIGKILL]
    _assert_one_line(f"{_name(job, 1)}, {_name(job, 3)} have not answered for 2.5 s", outcome.lines)


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, partial(_work, deed=partial(_kill, victims=(1,), number=signal.SIGSTOP)))
    outcome = job.outcome(stopped=(1,))
    assert outcome.codes == [1, None, 1]
    _assert_one_line(f"{_name(job, 1)} has not answered for 2.5 s", outcome.lines)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("launcher", [False, True])
def test_the_rank_with_the_store_is_named(tmp_path: Path, number: int, launcher: bool) -> None:
    job = Job(tmp_path, 3, partial(_work, deed=partial(_kill, victims=(0,), number=number)), launcher=launcher)
    outcome = job.outcome(stopped=(0,))
    assert outcome.codes[1:] == [1, 1]
    _assert_one_line(f"{_name(job, 0)} has gone", outcome.lines)


def test_a_launcher_that_ends_the_others_gets_the_name_first(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, partial(_work, deed=partial(_kill, victims=(1,))), launcher=True)
    job.ranks[1].join(HANGS)
    while not _ignores(signal.SIGTERM, job.ranks[0].pid):  # until it has got an error of the operation of both
        time.sleep(0.01)
    job.ranks[0].terminate()
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL]
    _assert_one_line(f"{_name(job, 1)} has not answered for 2.5 s", outcome.lines)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_launcher_that_ends_the_others_gets_the_error_first(tmp_path: Path, failing: int) -> None:
    deed = partial(_fail, error=DataError("shard 7 is damaged"), failing=failing)
    job = Job(tmp_path, 3, partial(_work, deed=deed), launcher=True)
    wait([process.sentinel for process in job.ranks], HANGS)
    for process in job.ranks:
        process.terminate()
    outcome = job.outcome()
    assert 0 not in outcome.codes
    assert outcome.lines == ["error: shard 7 is damaged"]


def test_the_end_of_the_launcher_hides_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, partial(_work, deed=partial(_kill_with_launcher, launcher=tmp_path)), launcher=True)
    assert job.launcher is not None
    (tmp_path / "launcher").write_text(str(job.launcher.pid))
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL, 1]
    _assert_one_line(f"{_name(job, 1)} has not answered for 2.5 s", outcome.lines)


@pytest.mark.parametrize(("size", "culprit", "where"), [(2, 1, 3), (4, 0, 1), (3, 2, 4)])
def test_a_living_rank_that_hangs_is_named_with_its_place(
    tmp_path: Path, size: int, culprit: int, where: int
) -> None:
    deed = partial(_hang, culprit=culprit, where=where)
    job = Job(tmp_path, size, partial(_work, timeout=HASTY, deed=deed, drowsy=culprit))
    outcome = job.outcome()
    assert outcome.codes == [1] * size
    _assert_one_line(
        rf"{_name(job, culprit)} has not left step {where} for 4.5 s while others wait, "
        r"and is at test_watchdog.py:\d+",
        outcome.lines,
    )


@pytest.mark.parametrize("launcher", [False, True])
def test_what_must_not_be_torn_is_finished_first(tmp_path: Path, launcher: bool) -> None:
    deed = partial(_kill, victims=(1,))
    job = Job(tmp_path, 3, partial(_work, deed=deed, saved=tmp_path), launcher=launcher)
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL, 1]
    assert sorted(path.name for path in tmp_path.glob("saved_*")) == ["saved_0", "saved_2"]
    assert len(outcome.lines) == 1


def test_a_mistake_that_all_ranks_notice_is_told_once(tmp_path: Path) -> None:
    outcome = Job(tmp_path, 4, partial(_work, deed=_fail_everywhere)).outcome()
    assert outcome.codes == [1, 1, 1, 1]
    assert outcome.lines == ["error: no tokens"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_users_mistake_on_one_rank_is_the_only_line(tmp_path: Path, failing: int) -> None:
    deed = partial(_fail, error=DataError("shard 7 is damaged"), failing=failing)
    job = Job(tmp_path, 3, partial(_work, deed=deed))
    outcome = job.outcome()
    assert outcome.codes == [1, 1, 1]
    assert outcome.lines == ["error: shard 7 is damaged"]


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect")])
def test_a_defect_on_one_rank_is_the_only_traceback(tmp_path: Path, error: Exception) -> None:
    job = Job(tmp_path, 3, partial(_work, deed=partial(_fail, error=error)))
    outcome = job.outcome()
    assert outcome.codes == [1, 1, 1]
    assert [line for line in outcome.lines if line.startswith(("[", "error"))] == []
    assert sum("Traceback" in line for line in outcome.lines) == 1
    assert f"{type(error).__name__}: a defect" in outcome.lines


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("launcher", [False, True])
def test_ranks_may_end_at_different_times(tmp_path: Path, last: int, launcher: bool) -> None:
    job = Job(tmp_path, 3, partial(_work, deed=partial(_end_one_after_another, last=last)), launcher=launcher)
    outcome = job.outcome()
    assert outcome.codes == [0, 0, 0]
    assert outcome.lines == []


def test_a_rank_that_has_ended_is_not_the_one_to_speak(tmp_path: Path) -> None:
    job = Job(tmp_path, 3, partial(_stay_until_killed, seen=tmp_path / "seen"))
    while not (tmp_path / "seen").exists():
        assert job.ranks[2].is_alive()
        time.sleep(0.01)
    job.ranks[0].kill()
    outcome = job.outcome()
    assert outcome.codes == [-signal.SIGKILL, 0, 1]
    _assert_one_line(f"{_name(job, 0)} has gone", outcome.lines)


def test_alone_it_does_nothing() -> None:
    with Watchdog(ALONE, PATIENT) as watchdog:
        watchdog.step(1)
    with pytest.raises(ValueError, match="as it is"), Watchdog(ALONE, PATIENT):
        raise ValueError("as it is")

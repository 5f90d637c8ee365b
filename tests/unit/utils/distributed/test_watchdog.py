"""The watchdog in jobs of real ranks that are killed, stopped, hang, fail or end: their output and exit codes.

Which ranks are named in which situation is tested without processes, in test_failure_detector and
test_rank_monitor. Here is one job for each thing that only a real process can do.
"""

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

SILENCE = timedelta(seconds=1.5)  # far longer than a busy machine lets a rank wait for its turn
LONG, SHORT = timedelta(seconds=2 * HANGS), timedelta(seconds=3)  # timeouts that must not, or must, matter
NOT_ANSWERED = "not answered for 1.5 s"
ADVICE = "; the job stops: resume with --resume latest"

Event = Callable[[int, int], None]  # called by each rank in each step, with the numbers of both


def _work(
    world: World, event: Event, timeout: timedelta = LONG, saved: Path | None = None, slow: int | None = None
) -> None:
    """Four steps with a sum over all ranks in each, and a slow save if the watchdog ends the process.

    The rank `slow` sends its heartbeat, and checks those of others, at a quarter of the usual rate.
    """

    def save() -> None:
        assert saved is not None
        time.sleep(0.3)
        (saved / f"saved_{world.rank}").touch()

    with (
        process_group(world, torch.device("cpu"), LONG),
        Watchdog(
            world,
            timeout,
            silence=4 * SILENCE if world.rank == slow else SILENCE,
            before_exit=save if saved else None,
        ) as watchdog,
    ):
        for step in range(1, 5):
            watchdog.step(step)
            event(world.rank, step)
            dist.all_reduce(torch.ones(8))
        event(world.rank, 5)


def _kill(rank: int, step: int, *, victims: tuple[int, ...], number: int = signal.SIGKILL) -> None:
    """In step 3 the victims get a signal while a collective operation runs."""
    if rank in victims and step == 3:
        dist.all_reduce(torch.ones(1 << 20), async_op=True)
        os.kill(os.getpid(), number)
    if step == 3:
        dist.all_reduce(torch.ones(1 << 20))


def _kill_with_launcher(rank: int, step: int, *, launcher: Path) -> None:
    """In step 3 rank 1 dies, and the launcher with it, as some launchers end when one of their ranks has died."""
    if rank == 1 and step == 3:
        os.kill(int((launcher / "launcher").read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _hang(rank: int, step: int, *, culprit: int, hangs_in: int) -> None:
    if rank == culprit and step == hangs_in:
        time.sleep(2 * HANGS)


def _fail(rank: int, step: int, *, error: Exception, failing: tuple[int, ...]) -> None:
    if rank in failing and step == 3:
        raise error


def _end_later(rank: int, step: int, *, last: int) -> None:
    """Rank `last` ends when the others have been silent for long, because they have ended."""
    if rank == last and step == 5:
        time.sleep(1.5 * SILENCE.total_seconds())


def _ignores(number: signal.Signals, pid: int | None) -> bool:
    """Whether a process ignores a signal."""
    (mask,) = re.findall(r"SigIgn:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def _name(job: Job, rank: int) -> str:
    return rf"rank {rank} \(host [^ ]+, pid {job.ranks[rank].pid}\)"


def _assert_one_line(line_pattern: str, lines: list[str]) -> None:
    assert len(lines) == 1, lines
    assert re.fullmatch(rf"\[Watchdog\] error: {line_pattern}{ADVICE}", lines[0]), lines[0]


def test_killed_ranks_are_named_and_the_others_save_first(tmp_path: Path) -> None:
    job = Job(tmp_path, 4, partial(_work, event=partial(_kill, victims=(1, 3)), saved=tmp_path), launcher=True)
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL, 1, -signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.glob("saved_*")) == ["saved_0", "saved_2"]
    _assert_one_line(f"{_name(job, 1)}, {_name(job, 3)} have {NOT_ANSWERED}", outcome.lines)


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, partial(_work, event=partial(_kill, victims=(1,), number=signal.SIGSTOP)))
    outcome = job.outcome(stopped=(1,))
    assert outcome.codes == [1, None]
    _assert_one_line(f"{_name(job, 1)} has {NOT_ANSWERED}", outcome.lines)


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGKILL, False), (signal.SIGSTOP, True)])
def test_the_rank_with_the_store_is_named(tmp_path: Path, number: int, launcher: bool) -> None:
    job = Job(tmp_path, 3, partial(_work, event=partial(_kill, victims=(0,), number=number)), launcher=launcher)
    outcome = job.outcome(stopped=(0,))
    assert outcome.codes[1:] == [1, 1]
    _assert_one_line(f"{_name(job, 0)} has gone", outcome.lines)


def test_the_name_is_logged_before_a_launcher_ends_the_rank(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, partial(_work, event=partial(_kill, victims=(1,))), launcher=True)
    job.ranks[1].join(HANGS)
    while not _ignores(signal.SIGTERM, job.ranks[0].pid):  # until the operation of both ranks has failed here
        time.sleep(0.01)
    job.ranks[0].terminate()
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL]
    _assert_one_line(f"{_name(job, 1)} has {NOT_ANSWERED}", outcome.lines)


def test_the_name_is_logged_when_the_launcher_dies_too(tmp_path: Path) -> None:
    event = partial(_kill_with_launcher, launcher=tmp_path)
    job = Job(tmp_path, 3, partial(_work, event=event), launcher=True)
    assert job.launcher is not None
    (tmp_path / "launcher").write_text(str(job.launcher.pid))
    outcome = job.outcome()
    assert outcome.codes == [1, -signal.SIGKILL, 1]
    _assert_one_line(f"{_name(job, 1)} has {NOT_ANSWERED}", outcome.lines)


def test_a_rank_that_hangs_is_named_with_its_line_of_code(tmp_path: Path) -> None:
    event = partial(_hang, culprit=0, hangs_in=4)
    job = Job(tmp_path, 3, partial(_work, timeout=SHORT, event=event, slow=0))
    outcome = job.outcome()
    assert outcome.codes == [1, 1, 1]
    _assert_one_line(
        rf"{_name(job, 0)} has not left step 4 for 2.7 s while others wait, and is at test_watchdog.py:\d+",
        outcome.lines,
    )


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1, 2)])
def test_an_error_that_a_user_can_mend_is_the_only_line(tmp_path: Path, failing: tuple[int, ...]) -> None:
    event = partial(_fail, error=DataError("shard 7 is damaged"), failing=failing)
    outcome = Job(tmp_path, 3, partial(_work, event=event)).outcome()
    assert outcome.codes == [1, 1, 1]
    assert outcome.lines == ["error: shard 7 is damaged"]


def test_an_error_is_printed_before_a_launcher_ends_the_rank(tmp_path: Path) -> None:
    event = partial(_fail, error=DataError("shard 7 is damaged"), failing=(0,))
    job = Job(tmp_path, 3, partial(_work, event=event), launcher=True)
    wait([process.sentinel for process in job.ranks], HANGS)
    for process in job.ranks:
        process.terminate()
    outcome = job.outcome()
    assert 0 not in outcome.codes
    assert outcome.lines == ["error: shard 7 is damaged"]


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("a defect")])
def test_a_defect_on_one_rank_is_the_only_traceback(tmp_path: Path, error: Exception) -> None:
    outcome = Job(tmp_path, 3, partial(_work, event=partial(_fail, error=error, failing=(1,)))).outcome()
    assert outcome.codes == [1, 1, 1]
    assert [line for line in outcome.lines if line.startswith(("[", "error"))] == []
    assert sum("Traceback" in line for line in outcome.lines) == 1
    assert f"{type(error).__name__}: a defect" in outcome.lines


@pytest.mark.parametrize(("last", "launcher"), [(0, False), (2, True)])
def test_ranks_may_end_at_different_times(tmp_path: Path, last: int, launcher: bool) -> None:
    job = Job(tmp_path, 3, partial(_work, event=partial(_end_later, last=last)), launcher=launcher)
    outcome = job.outcome()
    assert outcome.codes == [0, 0, 0]
    assert outcome.lines == []


def test_one_process_alone_has_nothing_to_watch() -> None:
    with Watchdog(ALONE, LONG) as watchdog:
        watchdog.step(1)
    with pytest.raises(ValueError, match="as it is"), Watchdog(ALONE, LONG):
        raise ValueError("as it is")

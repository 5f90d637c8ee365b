"""Saving in the background: changes, errors and kills meanwhile, and what a reader sees."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from deepseek_v3.utils.checkpointing import writer as dcp_writer
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, load_checkpoint
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter, load_sharded, newest_checkpoint, save_sharded
from deepseek_v3.utils.checkpointing.writer import CpuStager
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.errors import CheckpointError, TrainingError
from deepseek_v3.utils.files import remove_leftovers
from helpers import fork_server
from helpers.jobs import HANGS
from helpers.rank_pool import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_slow_disk(gate: threading.Event) -> Callable[..., Any]:
    """Writes the files, but waits until `gate` is open."""
    write = dcp_writer.write_tensor_file

    def wait_and_write(path: Path, tensors: dict[str, Tensor]) -> Any:
        assert gate.wait(timeout=HANGS)
        return write(path, tensors)

    return wait_and_write


def writing(function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """While entered, this process writes tensor files with another function."""
    return patch.object(dcp_writer, "write_tensor_file", function)


# One process


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written only while this is set."""
    event = threading.Event()
    monkeypatch.setattr(dcp_writer, "write_tensor_file", with_slow_disk(event))
    yield event
    event.set()


def test_changes_after_save_are_not_saved(gate: threading.Event, tmp_path: Path) -> None:
    weight, view = torch.zeros(4), torch.arange(6.0).view(2, 3).t()
    pending = save_sharded(tmp_path / "checkpoint_step_1", {"w": weight, "v": view}, {}, None)
    weight.fill_(9)
    view.fill_(9)
    assert not pending.finished()
    assert names(tmp_path) in ([], [".checkpoint_step_1.partial"])
    gate.set()
    assert pending.wait() == tmp_path / "checkpoint_step_1"
    assert pending.finished()
    saved = load_checkpoint(pending.path)
    assert saved["w"].tolist() == [0] * 4
    assert saved["v"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_save_waits_for_the_previous_one(gate: threading.Event, tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=5)
    opener = threading.Timer(0.2, gate.set)
    with ShardedWriter(checkpoints, None) as writer:
        first = writer.save(1, state(1))
        assert not first.finished()
        opener.start()
        second = writer.save(2, state(2))
        assert first.finished()
    assert second.finished()
    assert checkpoints.steps() == [1, 2]


def test_the_next_save_reuses_the_memory(tmp_path: Path) -> None:
    copies, weight = CpuStager(), torch.zeros(2, 2)
    places = []
    for step, view in enumerate((weight, weight, weight[:1], weight.bfloat16())):
        weight.fill_(step)
        folder = save_sharded(tmp_path / f"checkpoint_step_{step}", {"w": view}, {}, None, stager=copies).wait()
        assert torch.equal(load_checkpoint(folder)["w"], view)
        places.append(copies["w"].data_ptr())
    assert places[0] == places[1]
    assert copies["w"].dtype == torch.bfloat16


def test_the_error_of_a_save_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=5)
    writer = ShardedWriter(checkpoints, None)
    with monkeypatch.context() as broken:
        broken.setattr(dcp_writer, "write_tensor_file", full_disk)
        pending = writer.save(1, state(1))
        with pytest.raises(
            CheckpointError, match=r"checkpoint_step_1/rank_00000\.safetensors: cannot be written: No"
        ):
            pending.wait()
        with pytest.raises(CheckpointError, match="make room, or choose another folder"):
            writer.save(2, state(2))
    assert checkpoints.steps() == []
    assert names(tmp_path) == [".checkpoint_step_1.partial"]
    writer.save(2, state(2)).wait()
    assert names(tmp_path) == ["checkpoint_step_2"]


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), OSError(28, "No space")])
def test_finish_raises_no_error_of_a_save(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the watchdog before it ends the process."""

    def fail(path: Path, tensors: dict[str, Tensor]) -> None:
        raise error

    monkeypatch.setattr(dcp_writer, "write_tensor_file", fail)
    saving = ShardedWriter(CheckpointDirectory(tmp_path, keep=1), None)
    saving.finish()
    pending = saving.save(1, state(1))
    saving.finish()
    assert pending.finished()
    with pytest.raises((RuntimeError, CheckpointError)):
        saving.wait()


def test_an_error_of_the_run_hides_that_of_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dcp_writer, "write_tensor_file", full_disk)
    with pytest.raises(TrainingError, match="no longer a number"):
        save_and_fail(CheckpointDirectory(tmp_path, keep=1))
    told = [record.getMessage() for record in caplog.records if record.name == "deepseek_v3.Checkpoint"]
    assert len(told) == 1
    assert "cannot be written: No space left on device" in told[0]


def save_and_fail(checkpoints: CheckpointDirectory) -> None:
    with ShardedWriter(checkpoints, None) as writer:
        writer.save(1, state(1))
        raise TrainingError("the loss is no longer a number")


def full_disk(path: Path, tensors: dict[str, Tensor]) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["mkdir", "rename"])
def test_a_folder_without_permission_is_named(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, method, refuse)
    pending = save_sharded(tmp_path / "checkpoint_step_1", {"w": torch.zeros(1)}, {}, None)
    with pytest.raises(CheckpointError, match="checkpoint_step_1: cannot be written: Permission denied; make room"):
        pending.wait()
    monkeypatch.undo()
    assert CheckpointDirectory(tmp_path, keep=1).steps() == []


def test_a_defect_is_not_reported_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, tensors: dict[str, Tensor]) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(dcp_writer, "write_tensor_file", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_sharded(tmp_path / "checkpoint_step_1", {"w": torch.zeros(1)}, {}, None).wait()


def test_dtypes_without_a_safetensors_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"w is of torch.complex64; a sharded checkpoint holds torch\.float64"):
        save_sharded(tmp_path / "checkpoint_step_1", {"w": torch.zeros(1, dtype=torch.complex64)}, {}, None)
    assert names(tmp_path) == []


def save_slowly(folder: Path, seconds: float, end: Connection) -> None:
    """Saves twice, and ends while the second save is writing."""
    write = dcp_writer.write_tensor_file

    def slow(path: Path, tensors: dict[str, Tensor]) -> Any:
        path.write_bytes(b"half")
        end.send("writing")
        time.sleep(seconds)
        return write(path, tensors)

    save_sharded(folder / "checkpoint_step_1", {"w": torch.ones(1000)}, {"step": 1}, None).wait()
    dcp_writer.write_tensor_file = slow
    save_sharded(folder / "checkpoint_step_2", {"w": torch.ones(1000)}, {"step": 2}, None)


def started_saving(folder: Path, seconds: float) -> BaseProcess:
    """A process that is in its second save."""
    here, there = fork_server.CONTEXT.Pipe()
    run = fork_server.CONTEXT.Process(target=save_slowly, args=(folder, seconds, there), daemon=True)
    run.start()
    there.close()
    assert here.recv() == "writing"
    return run


def test_a_process_waits_for_its_save_before_it_exits(tmp_path: Path) -> None:
    run = started_saving(tmp_path, 0.3)
    run.join(HANGS)
    assert run.exitcode == 0
    assert load_checkpoint(tmp_path / "checkpoint_step_2")["w"].tolist() == [1] * 1000


def test_a_killed_process_leaves_only_complete_folders(tmp_path: Path) -> None:
    run = started_saving(tmp_path, HANGS)
    run.kill()
    run.join(HANGS)
    assert run.exitcode == -signal.SIGKILL
    checkpoints = CheckpointDirectory(tmp_path, keep=5)
    assert names(tmp_path) == [".checkpoint_step_2.partial", "checkpoint_step_1"]
    assert checkpoints.steps() == [1]
    path, found = checkpoints.latest()
    assert (path.name, found["step"]) == ("checkpoint_step_1", 1)
    with ShardedWriter(checkpoints, None) as writer:
        writer.save(3, state(3))
    assert names(tmp_path) == ["checkpoint_step_1", "checkpoint_step_3"]


# Kills at any moment


class _DeadError(BaseException):
    """Raised by every change of the disk that comes after the simulated kill."""


class _Dying:
    """While entered, simulates a kill before the `at`-th change of the disk; `died` tells whether it happened."""

    def __init__(self, at: int) -> None:
        self._left, self.died = at, False
        self._patches = [
            patch.object(os, name, self._counted(getattr(os, name)))
            for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
        ]

    def _counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def change_or_die(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 1:
                self.died = True
                raise _DeadError
            return change(*arguments, **options)

        return change_or_die

    def __enter__(self) -> _Dying:
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        for each in self._patches:
            each.stop()
        return self.died


def save_as(form: str, checkpoints: CheckpointDirectory, weight: float) -> None:
    content = {"step": 3, "model": {"weight": torch.full((5,), weight)}}
    if form == "file":
        checkpoints.save(3, content)
    else:
        with ShardedWriter(checkpoints, None) as writer:
            writer.save(3, content)


@pytest.mark.parametrize("first", ["file", "folder"])
@pytest.mark.parametrize("second", ["file", "folder"])
def test_a_step_saved_again_survives_a_kill_at_any_moment(first: str, second: str, tmp_path: Path) -> None:
    for moment in count(1):
        checkpoints = CheckpointDirectory(tmp_path / str(moment), keep=1)
        save_as(first, checkpoints, 1.0)
        with _Dying(moment) as saving:
            save_as(second, checkpoints, 2.0)
        for later in count(1):
            with _Dying(later) as tidying:
                remove_leftovers(checkpoints.path)
            if not tidying.died:
                break
        assert all(not name.startswith(".") for name in names(checkpoints.path)), moment
        weights = [load_checkpoint(path)["model"]["weight"].tolist() for path in checkpoints.newest_first()]
        assert weights, f"lost by a death at moment {moment}"
        assert all(weight in ([1.0] * 5, [2.0] * 5) for weight in weights)
        if not saving.died:
            break
    assert weights == [[2.0] * 5]


def test_leftovers_of_files_and_folders_are_removed(tmp_path: Path) -> None:
    left = [".checkpoint_step_7.pt.4711.partial", ".checkpoint_step_8.pt.1.partial"]
    others = [".checkpoint_step_7.pt.x.partial", ".checkpoint_step_7.pt", "model.pt", ".run.4711.partial"]
    for name in (*left, *others):
        (tmp_path / name).write_text("half")
    for state in ("partial", "outdated", "replaced"):
        (tmp_path / f".checkpoint_step_9.{state}").mkdir()
    (tmp_path / "checkpoint_step_9").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "checkpoint_step_9"])


# Several ranks


def background(folder: Path) -> None:
    """Training goes on while the ranks save, each at its own pace."""
    group, mesh = checkpoint_group(), init_device_mesh("cpu", (3,))
    checkpoints = CheckpointDirectory(folder, keep=2)
    gate = threading.Event()
    whole = torch.arange(14.0).view(7, 2)
    weight = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    with writing(with_slow_disk(gate)), ShardedWriter(checkpoints, group) as writer:
        pending = writer.save(1, {"step": 1, "model": {"weight": weight}})
        for step in range(20):
            weight.to_local().add_(1)
            total = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(total)
            assert total.item() == 3, step
        assert not pending.finished()
        gate.set()
        writer.save(2, {"step": 2, "model": {"weight": weight}})
        assert pending.finished()
    dist.barrier()
    for step, expected in ((1, whole), (2, whole + 20)):
        found = load_checkpoint(checkpoints.folder_of(step))
        assert found["step"] == step
        assert torch.equal(found["model"]["weight"], expected)
    assert newest_checkpoint(checkpoints, group) == checkpoints.folder_of(2)


def test_training_goes_on_while_ranks_save(pool: RankPool, tmp_path: Path) -> None:
    pool.run(3, background, tmp_path)
    assert names(tmp_path) == ["checkpoint_step_1", "checkpoint_step_2"]


def one_full_disk(folder: Path) -> None:
    """The disk of rank 1 fills up: all ranks get the error, and the next save succeeds."""
    group, mesh = checkpoint_group(), init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    message = r"checkpoint_step_1/rank_00001\.safetensors: cannot be written: No space"
    with writing(full_disk) if dist.get_rank() == 1 else nullcontext():
        pending = save_sharded(folder / "checkpoint_step_1", {"w": weight}, {}, group)
        with pytest.raises(CheckpointError, match=message):
            pending.wait()
    assert names(folder) == [".checkpoint_step_1.partial"]
    dist.barrier()
    save_sharded(folder / "checkpoint_step_2", {"w": weight}, {}, group).wait()
    assert names(folder) == ["checkpoint_step_2"]


def hosts_without_a_shared_disk(folder: Path) -> None:
    """Each rank has its own disk: the save raises a CheckpointError that says so."""
    group, mesh = checkpoint_group(), init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    mine = folder / f"host{dist.get_rank()}" / "checkpoint_step_1"
    mine.parent.mkdir()
    with pytest.raises(
        CheckpointError, match=r"rank_00001.safetensors: .* set checkpoint.directory to a folder that all"
    ):
        save_sharded(mine, {"w": weight}, {}, group).wait()
    assert names(mine.parent) == [".checkpoint_step_1.partial"]


def two_ranks(folder: Path) -> None:
    for case in (one_full_disk, hosts_without_a_shared_disk):
        (folder / case.__name__).mkdir(exist_ok=True)
        dist.barrier()
        case(folder / case.__name__)
        dist.barrier()


def test_an_error_of_one_rank_is_raised_on_all(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, two_ranks, tmp_path)


def killed_while_writing(folder: Path) -> None:
    group, mesh = checkpoint_group(), init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    save_sharded(folder / "checkpoint_step_1", {"w": weight}, {}, group).wait()
    if dist.get_rank() == 1:
        dcp_writer.write_tensor_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_sharded(folder / "checkpoint_step_2", {"w": weight}, {}, group).wait()


def test_a_killed_rank_leaves_only_complete_folders(tmp_path: Path) -> None:
    pool = RankPool(2)
    with pytest.raises(AssertionError, match="rank 1 has died"):
        pool.run(2, killed_while_writing, tmp_path)
    pool.close()
    assert names(tmp_path) == [".checkpoint_step_2.partial", "checkpoint_step_1"]
    assert CheckpointDirectory(tmp_path, keep=1).latest()[1]["w"].tolist() == [0, 1, 2, 3]


def newest_of_damaged(folder: Path) -> None:
    """All ranks choose the newest undamaged checkpoint; only rank 0 logs those that are skipped."""
    rank, group, checkpoints = dist.get_rank(), checkpoint_group(), CheckpointDirectory(folder, keep=9)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepseek_v3").addHandler(handler)
    with ShardedWriter(checkpoints, group) as writer:
        for step in (1, 2, 3):
            writer.save(step, {"model": {f"stage{rank}": torch.full((2,), float(step))}})
    if rank == 0:
        path = checkpoints.folder_of(3) / "rank_00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    path = newest_checkpoint(checkpoints, group)
    assert path == checkpoints.folder_of(2)
    assert len(lines) == (1 if rank == 0 else 0)
    weight = torch.zeros(2)
    load_sharded(path, {f"model.stage{rank}": weight}, group, verify=False)
    assert weight.tolist() == [2, 2]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_checkpoint(CheckpointDirectory(folder / "none", keep=1), group)
    logging.getLogger("deepseek_v3").removeHandler(handler)


def test_ranks_agree_on_the_newest(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, newest_of_damaged, tmp_path)

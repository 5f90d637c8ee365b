"""Locks on folders: one owner at a time, and none that has died."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.run_folders import lock_run_folders
from deepseek_v3.utils import locks
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.errors import DataError, InUseError
from deepseek_v3.utils.locks import hold_lock
from helpers import fork_server
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_corpus, write_run

ADVICE = "choose another folder"


def take(folder: Path, *, shared: bool = False) -> None:
    with hold_lock(folder / ".lock", folder, ADVICE, shared=shared):
        pass


def name_owner(folder: Path, *, kernel: str, silent: float = 0.0) -> Path:
    """The lock file of an owner whose kernel holds no lock, last touched `silent` seconds ago."""
    folder.mkdir(exist_ok=True)
    path = folder / ".lock"
    path.write_text(json.dumps({"host": "node7", "kernel": kernel, "pid": 4711, "command": "dsv3 train"}))
    now = path.stat().st_mtime
    os.utime(path, (now - silent, now - silent))
    return path


def test_a_second_process_is_refused_with_the_owners_name(tmp_path: Path) -> None:
    with hold_lock(tmp_path / ".lock", tmp_path, ADVICE):
        with pytest.raises(InUseError, match=rf"works on this run \(process {os.getpid()} on host "):
            take(tmp_path)
        with pytest.raises(InUseError, match=r"wait for it, or stop it; or choose another folder$"):
            take(tmp_path, shared=True)
    take(tmp_path)


def test_a_released_lock_leaves_no_files_of_its_own(tmp_path: Path) -> None:
    take(tmp_path / "runs" / "one")
    assert list(tmp_path.iterdir()) == []
    with hold_lock(tmp_path / "runs" / "one" / ".lock", tmp_path, ADVICE):
        (tmp_path / "runs" / "mine").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold_lock(tmp_path / ".lock", tmp_path, ADVICE):
        raise ZeroDivisionError
    take(tmp_path)


def test_a_folder_that_became_read_only_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def fail() -> None:
        with hold_lock(tmp_path / ".lock", tmp_path, ADVICE):
            monkeypatch.setattr(Path, "unlink", refuse)
            raise DataError("the work failed")

    with pytest.raises(DataError, match="the work failed"):
        fail()
    monkeypatch.undo()
    take(tmp_path)  # the file that stays holds no lock


def test_shared_locks_exclude_only_exclusive_ones(tmp_path: Path) -> None:
    with hold_lock(tmp_path / ".lock", tmp_path, ADVICE, shared=True):
        take(tmp_path, shared=True)
        with pytest.raises(InUseError, match="another process works on this run; wait"):
            take(tmp_path)
    take(tmp_path)


def hold(folder: Path, end: Connection) -> None:
    with hold_lock(folder / ".lock", folder, ADVICE):
        end.send("held")
        end.recv()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here, there = fork_server.CONTEXT.Pipe()
    process = fork_server.CONTEXT.Process(target=hold, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.recv() == "held"
    with pytest.raises(InUseError, match=f"process {process.pid} on host"):
        take(tmp_path)
    process.kill()
    process.join()
    take(tmp_path)
    assert f"took over the lock of a process that has died (process {process.pid} on host" in caplog.text


def test_an_owner_elsewhere_holds_the_lock_until_silent(tmp_path: Path) -> None:
    """Simulates a shared file system that does not show the locks of one host to the other."""
    name_owner(tmp_path, kernel="another", silent=50)
    for shared in (False, True):
        with pytest.raises(
            InUseError,
            match=r"\(process 4711 on host node7: dsv3 train\); .*; if it has died, start again 60 s after",
        ):
            take(tmp_path, shared=shared)
    name_owner(tmp_path, kernel="another", silent=70)
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_owner_decides_on_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / ".lock", tmp_path, ADVICE), pytest.raises(InUseError, match=f"process {os.getpid()}"):
        take(tmp_path)
    name_owner(tmp_path, kernel=locks._kernel(), silent=70)
    take(tmp_path)


def test_an_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = name_owner(tmp_path, kernel="another", silent=3600)
    descriptor = os.open(path, os.O_RDWR)
    assert locks._silence(descriptor, tmp_path) == pytest.approx(3600, abs=60)
    waits = iter([False, True])

    class _Once:
        def wait(self, _: float) -> bool:
            return next(waits)

    locks._touch(descriptor, _Once())  # type: ignore[arg-type]
    assert locks._silence(descriptor, tmp_path) < 60
    os.close(descriptor)


def test_a_lock_file_removed_meanwhile_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes must not both hold a lock file of the same name."""
    flock, path, calls = fcntl.flock, tmp_path / ".lock", []

    def remove_first(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if not calls:
            path.unlink()
        calls.append(operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with hold_lock(path, tmp_path, ADVICE):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
        assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', '"text"'])
def test_a_lock_file_without_an_owner_is_free(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    take(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match=r"taken/run: cannot be written: Not a directory; choose another folder"):
        take(tmp_path / "taken" / "run")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"new: cannot be written: No space left on device"):
        take(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# The folders of a run


@pytest.mark.parametrize("field", ["checkpoint", "logging"])
def test_a_second_run_in_a_folder_is_refused_and_writes_nothing(field: str, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = load_config(path)
    other = "logging" if field == "checkpoint" else "checkpoint"
    running = load_config(path, [f"{other}.directory={tmp_path / 'of_another'}"])
    with lock_run_folders(running, None):
        message = message_of(dsv3("train", "--device", "cpu", "--config", path, "--resume", "auto"))
    folder = getattr(config, field).directory
    assert f"{folder}: another process works on this run" in message
    assert f"or choose another with --set {field}.directory=..." in message
    assert not folder.exists()
    assert not config.data.path.exists()


def test_checkpoints_and_logs_may_share_a_folder(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), [f"checkpoint.directory={tmp_path / 'run' / '..' / 'run'}"])
    with lock_run_folders(config, None), pytest.raises(InUseError):
        take(tmp_path / "run")
    take(tmp_path / "run")


def test_a_run_removes_the_partial_files_of_killed_runs(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    folders = {
        config.checkpoint.directory: [".checkpoint_step_2.pt.4711.partial", ".probe.12.partial"],
        config.logging.directory: [".config.yaml.4711.partial", ".metrics.jsonl.1.partial", ".loss.png.1.partial"],
    }
    for folder, names in folders.items():
        folder.mkdir()
        for name in (*names, ".mine.1.partial"):
            (folder / name).write_text("half")
    with lock_run_folders(config, None):
        for folder in folders:
            assert sorted(path.name for path in folder.iterdir()) == [".lock", ".mine.1.partial"]


def take_folders_by_ranks(config: Path) -> str:
    try:
        with lock_run_folders(load_config(config), checkpoint_group()):
            return "held"
    except InUseError as error:
        return str(error)


def test_all_ranks_are_refused_with_one_message(pool: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with lock_run_folders(load_config(path), None):
        messages = pool.run(2, take_folders_by_ranks, path)
    assert "another process works on this run" in messages[0]
    assert messages[0] == messages[1]
    assert pool.run(2, take_folders_by_ranks, path) == ["held", "held"]


# Tokens


def test_two_processes_do_not_write_the_same_tokens(tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    build = ("tokenize", "--input", write_corpus(tmp_path / "text"), "--vocab-size", "300", "--output", output)
    with hold_lock(tmp_path / ".tokens.lock", output, ADVICE):
        assert f"{output}: another process works on this run" in message_of(dsv3(*build))
        assert not output.exists()
    left = [tmp_path / ".tokens.4711.partial", tmp_path / ".tokens.12.partial"]
    others = [tmp_path / ".tokens.x.partial", tmp_path / ".tokens2.12.partial", tmp_path / "tokens.12.partial"]
    for folder in (*left, *others):
        folder.mkdir()
        (folder / "half").touch()
    assert dsv3(*build, "--workers", "1").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"text", "tokens", *(path.name for path in others)}

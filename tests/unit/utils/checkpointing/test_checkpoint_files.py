"""Checkpoints of one file, and the directory of a run."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from collections import OrderedDict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.utils.checkpointing.directory import (
    CheckpointDirectory,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.errors import CheckpointError
from helpers import ROOT, fork_server
from helpers.jobs import HANGS


def small_state(step: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "model": OrderedDict(
            weight=torch.arange(12.0).reshape(3, 4), bias=torch.full((3,), 0.5, dtype=torch.bfloat16)
        ),
        "optimizer": {
            "moments": {0: torch.zeros(3), 1: torch.tensor([255], dtype=torch.uint8)},
            "betas": (0.9, 0.95),
        },
        "ema": torch.nn.Parameter(torch.tensor(0.25)),
        "rng": torch.tensor([2**62 + 1]),
        "config": {"name": "tiny", "layers": [1, 2, 3], "rope_scaling": None, "tied": True},
    }


def assert_equal_states(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for key in expected:
            assert_equal_states(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "checkpoint_step_0.pt"
    save_checkpoint(path, small_state())
    return path.read_bytes()


def assert_refused(path: Path, *, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# Undamaged checkpoints


def test_state_survives_a_round_trip_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint_step_7.pt"
    save_checkpoint(path, small_state(7))
    before = path.read_bytes()
    assert_equal_states(load_checkpoint(path), small_state(7))
    assert_equal_states(load_checkpoint(path, verify=False, map_location=torch.device("cpu")), small_state(7))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    save_checkpoint(tmp_path / "tied.pt", {"embed": weight, "head": weight})
    state = load_checkpoint(tmp_path / "tied.pt")
    assert state["embed"].data_ptr() == state["head"].data_ptr()


def test_the_file_is_a_plain_archive_with_its_hash_as_comment(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_1.pt"
    save_checkpoint(path, small_state())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    hashed = path.read_bytes().removesuffix(comment)
    assert comment == f"sha256:{hashlib.sha256(hashed).hexdigest()}".encode()
    assert_equal_states(torch.load(path, mmap=True, weights_only=True), small_state())


# Damage


def test_every_flipped_byte_is_found(good_bytes: bytes, tmp_path: Path) -> None:
    random_bits = random.Random(0)
    path = tmp_path / "checkpoint_step_0.pt"
    for offset in range(len(good_bytes)):
        damaged = bytearray(good_bytes)
        damaged[offset] ^= 1 << random_bits.randrange(8)
        path.write_bytes(damaged)
        assert_refused(path)


def test_every_byte_of_the_checksum_is_checked(good_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_0.pt"
    for offset in range(len(good_bytes) - 100, len(good_bytes)):
        for bit in range(8):
            damaged = bytearray(good_bytes)
            damaged[offset] ^= 1 << bit
            path.write_bytes(damaged)
            assert_refused(path)


def test_every_truncation_is_found(good_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_0.pt"
    ends = range(len(good_bytes) - 100, len(good_bytes))
    for length in [*range(0, len(good_bytes), 11), *ends]:
        path.write_bytes(good_bytes[:length])
        assert_refused(path, match="cut short")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(junk=st.binary(max_size=300), where=st.sampled_from(["alone", "before", "after"]))
def test_foreign_bytes_are_refused(
    junk: bytes, where: str, good_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "checkpoint_step_0.pt"
    content = {"alone": junk, "before": junk + b"!" + good_bytes, "after": good_bytes + b"!" + junk}[where]
    path.write_bytes(content)
    assert_refused(path)


def test_damage_without_a_checksum_is_still_a_checkpoint_error(good_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_0.pt"
    for length in range(0, len(good_bytes) - 100, 41):
        path.write_bytes(good_bytes[:length])
        with pytest.raises(CheckpointError, match="not an archive of tensors"):
            load_checkpoint(path, verify=False)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "checkpoint_step_1.pt", match="no such file")
    assert_refused(tmp_path, match=r"index\.json: there is no such file")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_path_without_permission_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looked = tmp_path / "checkpoint_step_1", Path.stat

    def refuse(other: Path, **options: Any) -> Any:
        if other == path:
            raise OSError(number, os.strerror(number))
        return looked(other, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    for ask in (load_checkpoint, is_checkpoint, open_checkpoint):
        with pytest.raises(CheckpointError, match=f"cannot be read: {os.strerror(number)}; expected"):
            ask(path)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / ("a" * 300), match="cannot be read: File name too long")


def test_broken_links_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint_step_1", "checkpoint_step_2.pt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "checkpoint_step_3").symlink_to(tmp_path / "checkpoint_step_3")
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.latest()
    assert_refused(tmp_path / "checkpoint_step_1", match="there is no such file")
    assert_refused(tmp_path / "checkpoint_step_3", match="Too many levels of symbolic links")


def test_an_archive_without_a_checksum_is_refused(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "plain.pt")
    assert_refused(tmp_path / "plain.pt", match="does not end in a checksum")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert_refused(tmp_path / "text.pt", match="does not end in a checksum")


class Exploit:
    """Calls `print` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the code in the checkpoint ran",)


def with_checksum(archive: bytes) -> bytes:
    hashed = archive[:-2] + (71).to_bytes(2, "little")
    return hashed + f"sha256:{hashlib.sha256(hashed).hexdigest()}".encode()


@pytest.mark.parametrize("verify", [True, False])
def test_code_in_a_checkpoint_is_not_run(verify: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    torch.save({"state": Exploit()}, buffer)
    path = tmp_path / "checkpoint_step_1.pt"
    path.write_bytes(with_checksum(buffer.getvalue()))
    with pytest.raises(CheckpointError, match="tensors and plain values alone"):
        load_checkpoint(path, verify=verify)
    path.write_bytes(pickle.dumps(Exploit(), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path, verify=verify)
    assert "ran" not in capsys.readouterr().out


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(2), buffer)
    (tmp_path / "tensor.pt").write_bytes(with_checksum(buffer.getvalue()))
    assert_refused(tmp_path / "tensor.pt", match="holds a Tensor, expected a dict")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (torch.eye(2).to_sparse(), r"state\['x'\] is a sparse, quantized or meta tensor"),
        (torch.Size([1]), r"state\['x'\] is a Size"),
        ({(1, 2): 3}, r"state\['x'\] has the key \(1, 2\)"),
    ],
)
def test_values_that_cannot_be_saved_are_not_loaded(value: Any, where: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": value}, buffer)
    (tmp_path / "other.pt").write_bytes(with_checksum(buffer.getvalue()))
    assert_refused(tmp_path / "other.pt", match=where)


def test_a_checkpoint_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["x"] = state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (tmp_path / "other.pt").write_bytes(with_checksum(buffer.getvalue()))
    assert_refused(tmp_path / "other.pt", match="recursion")


@pytest.mark.parametrize("name", ["checkpoint_step_1.pt", "checkpoint_step_1/index.json"])
def test_a_pipe_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    path = tmp_path / name.split("/")[0]
    assert_refused(path, match="cannot be read: Not a regular file")
    with pytest.raises(CheckpointError, match="Not a regular file"):
        load_checkpoint(path, verify=False)


def test_only_one_module_unpickles_and_only_weights() -> None:
    sources = [path for path in (ROOT / "src").rglob("*.py") if "torch.load(" in path.read_text(encoding="utf-8")]
    assert [path.name for path in sources] == ["single_file.py"]
    assert "weights_only=True, mmap" in sources[0].read_text(encoding="utf-8")
    assert not any("add_safe_globals" in path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))


def test_a_full_gpu_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "checkpoint_step_1.pt", small_state())

    def run_out_of_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "load", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load_checkpoint(tmp_path / "checkpoint_step_1.pt")


# Saves that fail


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [torch.zeros(1), np.float64(1.0)]}, r"state\['a'\]\[1\] is a float64"),
        ({"config": Path("x")}, r"state\['config'\] is a \w*Path"),
        ({"a": {"b": {1, 2}}}, r"state\['a'\]\['b'\] is a set"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] has the key \(1, 2\)"),
        ({"f": lambda: None}, r"state\['f'\] is a function"),
    ],
)
def test_values_that_would_not_load_are_not_saved(value: dict[str, Any], where: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "checkpoint_step_1.pt", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 700, 50_000])
def test_a_full_disk_leaves_previous_checkpoints_alone(room: int, tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    earlier = checkpoints.save(1, small_state(1))
    before = earlier.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint_step_2\.pt: cannot be written: File too large; make room"
        ):
            checkpoints.save(2, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [earlier]
    assert earlier.read_bytes() == before


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "checkpoint_step_1.pt", small_state())
    assert list(tmp_path.iterdir()) == []


def test_errors_other_than_the_disks_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: object, file: io.BufferedWriter) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_checkpoint(tmp_path / "checkpoint_step_1.pt", small_state())


def test_an_archive_without_room_for_a_checksum_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", lambda _, file: file.write(b"another format " * 10))
    with pytest.raises(RuntimeError, match="other than a ZIP archive"):
        save_checkpoint(tmp_path / "checkpoint_step_1.pt", small_state())
    assert list(tmp_path.iterdir()) == []


def save_and_stall(folder: Path, end: Connection) -> None:
    """Saves twice; all bytes of the second file are written, and it has not got its name yet."""
    checkpoints = CheckpointDirectory(folder, keep=2)
    checkpoints.save(1, {"step": 1, "weights": torch.ones(1000)})

    def stall(descriptor: int) -> None:
        end.send("saving")
        time.sleep(HANGS)

    os.fsync = stall
    checkpoints.save(2, {"step": 2, "weights": torch.ones(1000)})


def test_a_killed_run_leaves_only_complete_files(tmp_path: Path) -> None:
    here, there = fork_server.CONTEXT.Pipe()
    run = fork_server.CONTEXT.Process(target=save_and_stall, args=(tmp_path, there), daemon=True)
    run.start()
    there.close()
    assert here.recv() == "saving"
    run.kill()
    run.join(HANGS)
    assert run.exitcode == -signal.SIGKILL
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    assert checkpoints.steps() == [1]
    path, state = checkpoints.latest()
    assert path.name == "checkpoint_step_1.pt"
    assert state["step"] == 1


# The folder of a run


def test_the_newest_are_kept_and_other_files_left_alone(tmp_path: Path) -> None:
    others = [
        "checkpoint_step_1.pt.bak",
        "checkpoint_step_01.pt",
        "checkpoint_step_-1.pt",
        "model.pt",
        "checkpoint_step_x.pt",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint_step_2.pt").mkdir()
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    for step in (0, 9, 10, 100):
        assert checkpoints.save(step, small_state(step)) == tmp_path / f"checkpoint_step_{step}.pt"
    assert checkpoints.steps() == [10, 100]
    assert {path.name for path in tmp_path.iterdir()} == {
        *others,
        "checkpoint_step_2.pt",
        "checkpoint_step_10.pt",
        "checkpoint_step_100.pt",
    }


def test_checkpoints_of_later_steps_are_not_counted(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint_step_{step}.pt").write_text("damaged")
    checkpoints.save(5, small_state(5))
    assert checkpoints.steps() == [5, 10, 20, 30]
    checkpoints.save(25, small_state(25))
    assert checkpoints.steps() == [20, 25, 30]


def test_a_step_saved_again_replaces_the_file(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    checkpoints.save(3, {"attempt": 1})
    checkpoints.save(3, {"attempt": 2})
    assert checkpoints.latest() == (tmp_path / "checkpoint_step_3.pt", {"attempt": 2})


def test_latest_skips_damaged_checkpoints_and_logs_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, small_state(step))
    newest, second = tmp_path / "checkpoint_step_3.pt", tmp_path / "checkpoint_step_2.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    flipped = bytearray(second.read_bytes())
    flipped[300] ^= 1
    second.write_bytes(flipped)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with caplog.at_level(logging.WARNING):
        path, state = checkpoints.latest()

    assert path == tmp_path / "checkpoint_step_1.pt"
    assert_equal_states(state, small_state(1))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "checkpoint_step_3.pt: does not end in a checksum" in caplog.messages[0]
    assert "checkpoint_step_2.pt: is damaged" in caplog.messages[1]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_latest_names_a_folder_without_a_usable_checkpoint(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path / "run", keep=1)
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="run: holds no checkpoint"):
        checkpoints.latest()
    checkpoints.save(4, small_state())
    (tmp_path / "run" / "checkpoint_step_4.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="run: none of its 1 checkpoints can be loaded"):
        checkpoints.latest()


def test_a_new_run_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    checkpoints.refuse_if_used()
    checkpoints.save(400, small_state())
    with pytest.raises(
        CheckpointError, match="already holds checkpoints up to step 400; continue with --resume latest"
    ):
        checkpoints.refuse_if_used()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="taken: cannot be read as a folder: Not a directory"):
        CheckpointDirectory(tmp_path / "taken", keep=1).refuse_if_used()
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointDirectory(tmp_path / "taken", keep=1).save(1, small_state())


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        CheckpointDirectory(tmp_path, keep=0)

"""The disk that a run's checkpoints need: estimated, and refused before the run begins where it is not there."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.disk_space import check_disk, checkpoint_bytes
from deepseek_v3.training.run_folders import lock_run_folders
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.errors import CheckpointError, PlanError
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Twenty steps with a checkpoint after every second one, of which three are kept."""
    (tmp_path / "checkpoints").mkdir()
    return load_config(write_run(tmp_path, 20), ["checkpoint.keep=3"])


def with_free(monkeypatch: pytest.MonkeyPatch, config: RunConfig, checkpoints: float) -> None:
    """The disk has room for this number of checkpoints."""
    free = int(checkpoints * checkpoint_bytes(config))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - free, free))


def leave(config: RunConfig, *steps: int) -> None:
    for step in steps:
        path = config.checkpoint.directory / f"checkpoint_step_{step}.pt"
        path.write_bytes(b"\0" * checkpoint_bytes(config))


def test_room_for_what_is_kept_and_what_is_written(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, config, 4)
    check_disk(config, None, force=False)
    with_free(monkeypatch, config, 3.9)
    with pytest.raises(PlanError, match=r"need 1\.\d\d MB and 1\.\d\d MB are free: each takes 0\.\d\d MB") as error:
        check_disk(config, None, force=False)
    assert str(config.checkpoint.directory) in str(error.value)
    assert "checkpoint.keep = 3 are kept, and one more is being written; set checkpoint.keep=2, which" in str(
        error.value
    )
    assert str(error.value).endswith("--set checkpoint.directory=...; --force starts it as it is")


@pytest.mark.parametrize(("room", "advice"), [(2, "set checkpoint.keep=1"), (1.9, "written; make room, or choose")])
def test_the_shortest_change_is_named(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, room: float, advice: str
) -> None:
    with_free(monkeypatch, config, room)
    with pytest.raises(PlanError, match=advice):
        check_disk(config, None, force=False)


def test_force_starts_it_with_a_warning(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, config, 0)
    check_disk(config, None, force=True)
    assert "started by --force although" in caplog.messages[0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(("interval", "needed"), [(0, 1), (19, 2), (20, 1), (7, 3), (5, 4), (1, 4)])
def test_a_run_of_few_saves_needs_no_more_than_those(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, interval: int, needed: int
) -> None:
    checkpoint = config.checkpoint.model_copy(update={"interval_steps": interval})
    config = config.model_copy(update={"checkpoint": checkpoint})
    with_free(monkeypatch, config, needed)
    check_disk(config, None, force=False)
    with_free(monkeypatch, config, needed - 0.1)
    with pytest.raises(PlanError):
        check_disk(config, None, force=False)


@pytest.mark.parametrize(
    ("steps", "needed"), [((2,), 3), ((2, 4, 6), 1), ((16, 18), 1), ((12, 14, 16, 18), 1), ((18, 20), 0)]
)
def test_what_a_resumed_run_has_counts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], needed: int
) -> None:
    leave(config, *steps)
    with_free(monkeypatch, config, needed)
    check_disk(config, "latest", force=False)
    if needed:
        with_free(monkeypatch, config, needed - 0.1)
        with pytest.raises(PlanError):
            check_disk(config, "auto", force=False)


@pytest.mark.parametrize(
    ("every", "there", "needed"),
    [
        (4, (), 7),  # 4, 8, 12; 14, 16, 18; and 20, which is being written
        (10, (), 5),  # 10; 14, 16, 18; 20
        (20, (), 4),
        (4, (4, 6, 8), 4),  # of those seven, two are there, and 6 goes
        (2, (18,), 1),
    ],
)
def test_what_is_kept_for_ever_counts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, every: int, there: tuple[int, ...], needed: int
) -> None:
    checkpoint = config.checkpoint.model_copy(update={"keep_every_steps": every})
    config = config.model_copy(update={"checkpoint": checkpoint})
    leave(config, *there)
    with_free(monkeypatch, config, needed)
    check_disk(config, "latest", force=False)
    with_free(monkeypatch, config, needed - 0.1)
    with pytest.raises(
        PlanError, match=f"are kept and those of every {every} steps, and one more is being written"
    ):
        check_disk(config, "latest", force=False)


@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
def test_the_types_of_the_config_count(config: RunConfig, moments: str) -> None:
    optimizer = config.training.optimizer.model_copy(update={"moments": moments})
    training = config.training.model_copy(update={"optimizer": optimizer})
    other = config.model_copy(update={"training": training})
    per_parameter = {"bfloat16": 8, "float32": 12}[moments]
    assert checkpoint_bytes(other) / per_parameter == pytest.approx(48_000, rel=0.3)


def test_a_run_without_room_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, 20)
    with_free(monkeypatch, load_config(path), 0.5)
    message = message_of(dsv3("train", "--device", "cpu", "--config", path))
    assert "the next checkpoints need" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.yaml", "text"]


def test_a_folder_that_is_a_file_is_refused_at_the_start(tmp_path: Path) -> None:
    path = write_run(tmp_path, 20)
    (tmp_path / "checkpoints").touch()
    message = message_of(dsv3("train", "--device", "cpu", "--config", path, "--force"))
    assert f"{tmp_path / 'checkpoints'}: cannot be written: File exists; choose another" in message
    assert not (tmp_path / "tokens").exists()


def start_without_room(path: Path) -> str:
    full = shutil._ntuple_diskusage(2**40, 2**40, 0 if dist.get_rank() == 0 else 2**40)
    with (
        patch.object(shutil, "disk_usage", lambda _: full),
        pytest.raises(PlanError) as error,
        lock_run_folders(load_config(path), checkpoint_group()),
    ):
        pass
    return str(error.value)


def start_on_disks_of_their_own(path: Path) -> str:
    config = load_config(path)
    checkpoint = config.checkpoint.model_copy(update={"directory": Path("checkpoints")})
    place = path.parent / f"host{dist.get_rank()}"
    (place / "checkpoints").mkdir(parents=True)
    before = Path.cwd()
    os.chdir(place)
    try:
        with (
            pytest.raises(CheckpointError) as error,
            lock_run_folders(config.model_copy(update={"checkpoint": checkpoint}), checkpoint_group()),
        ):
            pass
    finally:
        os.chdir(before)
    assert list((place / "checkpoints").iterdir()) == []
    return str(error.value)


def test_all_ranks_are_refused_alike(pool: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path, 20)
    others = pool.run(2, start_on_disks_of_their_own, path)
    assert "rank 1 on host" in others[0]
    assert "set checkpoint.directory to a folder that all hosts share" in others[0]
    full = pool.run(2, start_without_room, path)
    assert "the next checkpoints need" in full[0]
    assert (others[0], full[0]) == (others[1], full[1])

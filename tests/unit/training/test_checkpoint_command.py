"""`dsv3 checkpoint`: damaged checkpoints are named, and no good one goes for them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.checkpoint_command import describe, outdated_checkpoints
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, load_checkpoint, save_checkpoint
from deepseek_v3.utils.checkpointing.sharded import save_sharded
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from helpers.runs import dsv3, message_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 to 10, the last two as folders."""
    directory = CheckpointDirectory(tmp_path / "checkpoints", keep=100)
    directory.path.mkdir()
    for step in (2, 4, 6):
        directory.save(step, _state(step))
    for step in (8, 10):
        tensors, plain = flatten(_state(step))
        save_sharded(directory.folder_of(step), tensors, plain, None).wait()
    return directory.path


def _state(step: int) -> dict[str, object]:
    return {"model": {"weight": torch.arange(1000.0)}, "step": step, "tokens": 100 * step}


def _damage(path: Path) -> None:
    """Flips a bit in the middle of a checkpoint's largest file."""
    file = path if path.is_file() else max(path.iterdir(), key=lambda each: each.stat().st_size)
    found = bytearray(file.read_bytes())
    found[len(found) // 2] ^= 1
    file.write_bytes(found)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_list_says_what_every_checkpoint_holds(folder: Path) -> None:
    result = dsv3("checkpoint", "list", folder)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("checkpoint_step")]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("checkpoint_step_10", "10", "1,000", "1"),
        ("checkpoint_step_8", "8", "800", "1"),
        ("checkpoint_step_6.pt", "6", "600", "1"),
        ("checkpoint_step_4.pt", "4", "400", "1"),
        ("checkpoint_step_2.pt", "2", "200", "1"),
    ]
    assert "5 checkpoints, " in result.output
    assert f"dsv3 checkpoint verify {folder}" in result.output


def test_a_list_as_json_names_what_cannot_be_read(folder: Path) -> None:
    (folder / "checkpoint_step_4.pt").write_bytes(b"not a checkpoint")
    result = dsv3("checkpoint", "list", folder, "--json")
    found = {entry["step"]: entry for entry in json.loads(result.stdout)}
    assert set(found) == {10, 8, 6, None, 2}
    assert found[10]["bytes"] == sum(file.stat().st_size for file in (folder / "checkpoint_step_10").iterdir())
    assert found[6]["problem"] is None
    assert "checkpoint_step_4.pt" in found[None]["problem"]
    assert found[None]["tensors"] is None


def test_the_time_of_a_checkpoint_is_that_of_its_last_file(folder: Path) -> None:
    path = folder / "checkpoint_step_6.pt"
    os.utime(path, (1_700_000_000, 1_700_000_000))
    assert describe(path).saved.timestamp() == 1_700_000_000


def test_undamaged_checkpoints_pass(folder: Path) -> None:
    result = dsv3("checkpoint", "verify", folder)
    assert result.exit_code == 0, result.output
    assert "5 checkpoints undamaged" in result.output


@pytest.mark.parametrize("name", ["checkpoint_step_6.pt", "checkpoint_step_10"])
def test_one_flipped_bit_fails(folder: Path, name: str) -> None:
    _damage(folder / name)
    assert message_of(dsv3("checkpoint", "verify", folder)).startswith("1 of 5 checkpoints damaged")
    assert message_of(dsv3("checkpoint", "verify", folder / name)).startswith("1 of 1 checkpoint damaged")


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    for words in (["list"], ["verify"], ["prune", "--keep", "1"]):
        assert "holds no checkpoint" in message_of(dsv3("checkpoint", words[0], tmp_path, *words[1:]))
    assert "holds no checkpoint" in message_of(dsv3("checkpoint", "verify", tmp_path / "nothing"))


def test_the_newest_stay(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    result = dsv3("checkpoint", "prune", folder, "--keep", "2")
    assert result.exit_code == 0, result.output
    assert "3 checkpoints removed" in result.output
    assert _names(folder) == ["checkpoint_step_10", "checkpoint_step_8", "notes.txt"]


def test_a_dry_run_removes_nothing(folder: Path) -> None:
    before = _names(folder)
    result = dsv3("checkpoint", "prune", folder, "--keep", "1", "--dry-run")
    assert "4 checkpoints would be removed" in result.output
    assert _names(folder) == before


def test_multiples_of_a_number_of_steps_stay(folder: Path) -> None:
    assert [path.name for path in outdated_checkpoints(folder, 1, every=4)] == [
        "checkpoint_step_6.pt",
        "checkpoint_step_2.pt",
    ]


def test_damaged_ones_do_not_count_as_kept(folder: Path) -> None:
    """The newest two are damaged, so that the third is the only good one to keep."""
    for name in ("checkpoint_step_10", "checkpoint_step_8"):
        _damage(folder / name)
    assert [path.name for path in outdated_checkpoints(folder, 1)] == [
        "checkpoint_step_4.pt",
        "checkpoint_step_2.pt",
    ]


def test_nothing_is_removed_if_all_are_damaged(folder: Path) -> None:
    for path in folder.iterdir():
        _damage(path)
    with pytest.raises(CheckpointError, match="none of its checkpoints is undamaged; nothing was removed"):
        outdated_checkpoints(folder, 1)


def test_fewer_than_are_to_be_kept_all_stay(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint_step_10")
    assert not outdated_checkpoints(folder, 10)


def _weights(tmp_path: Path, step: int, values: list[float], **changes: object) -> Path:
    path = tmp_path / f"step_{step}.pt"
    weights = {"w": torch.tensor(values), "b": torch.tensor([step], dtype=torch.bfloat16)}
    state = {
        "model": weights,
        "tokenizer": "{}",
        "step": step,
        "optimizer": {"m": torch.ones(9)},
        "tokens": 10 * step,
    }
    save_checkpoint(path, {**state, **changes})
    return path


def test_an_average_has_the_means_and_the_rest_of_the_last_step(tmp_path: Path) -> None:
    paths = [_weights(tmp_path, step, [step, -step, 0.1]) for step in (9, 3, 6)]
    result = dsv3("checkpoint", "average", *paths, "--output", tmp_path / "mean.pt")
    assert result.exit_code == 0, result.output
    found = load_checkpoint(tmp_path / "mean.pt")
    assert found["model"]["w"].tolist() == pytest.approx([6, -6, 0.1])
    assert found["model"]["b"].dtype == torch.bfloat16
    assert found["model"]["b"].item() == 6
    assert (found["step"], found["tokens"], "optimizer" in found) == (9, 90, False)


def test_checkpoints_of_other_models_are_not_averaged(tmp_path: Path) -> None:
    one, output = _weights(tmp_path, 1, [1.0, 2.0]), tmp_path / "mean.pt"
    longer, other = _weights(tmp_path, 2, [1.0]), _weights(tmp_path, 3, [1.0, 2.0], tokenizer="{ }")
    assert "as 'model.w'" in message_of(dsv3("checkpoint", "average", one, longer, "--output", output))
    assert "has another tokenizer" in message_of(dsv3("checkpoint", "average", one, other, "--output", output))
    assert "name two or more" in message_of(dsv3("checkpoint", "average", one, "--output", output))
    assert "exists" in message_of(dsv3("checkpoint", "average", one, one, "--output", one))
    _damage(one)
    assert "damaged" in message_of(dsv3("checkpoint", "average", one, one, "--output", output))
    assert not output.exists()


@pytest.mark.parametrize("name", ["", "checkpoint_step_10"])
def test_a_folder_becomes_one_file(folder: Path, tmp_path: Path, name: str) -> None:
    """Of several checkpoints the newest that is undamaged."""
    step = 10
    if not name:
        _damage(folder / "checkpoint_step_10")
        step = 8
    result = dsv3("checkpoint", "consolidate", folder / name, "--output", tmp_path / "one.pt")
    assert result.exit_code == 0, result.output
    found, expected = load_checkpoint(tmp_path / "one.pt"), _state(step)
    assert found["model"]["weight"].equal(expected["model"]["weight"])  # type: ignore[index]
    assert (found["step"], found["tokens"]) == (expected["step"], expected["tokens"])


def test_a_run_keeps_multiples_of_a_number_of_steps_for_ever(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2, keep_every=6)
    for step in range(2, 21, 2):
        directory.save(step, _state(step))
    assert directory.steps() == [6, 12, 18, 20]


@pytest.mark.parametrize(("interval", "every"), [(1000, 1500), (1000, 500), (0, 10)])
def test_what_is_never_saved_cannot_be_kept(interval: int, every: int) -> None:
    changes = [f"checkpoint.interval_steps={interval}", f"checkpoint.keep_every_steps={every}"]
    with pytest.raises(ConfigError, match=f"keep_every_steps = {every}: expected a multiple of interval_steps"):
        load_config("tiny", changes)

"""Weights with NaN or infinity are never saved, resumed, evaluated or used to generate text."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.evaluation.perplexity import Comparison
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.optimizer import StepLimits, local
from deepseek_v3.training.parallel.data_parallel import DataParallelEngine
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.validation import ValidationLoss, Validator
from deepseek_v3.utils.checkpointing.checks import non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.directory import load_checkpoint, save_checkpoint
from deepseek_v3.utils.errors import TrainingError
from helpers import parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

WEIGHT, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"


@torch.no_grad()
def spoil_weight(engine: DataParallelEngine) -> None:
    local(engine.models[0].get_parameter(WEIGHT))[-1] = math.inf


@torch.no_grad()
def spoil_moment(engine: DataParallelEngine) -> None:
    engine.optimizer.state[engine.models[0].get_parameter(WEIGHT)]["exp_avg_sq"][2] = math.nan


@torch.no_grad()
def spoil_bias(engine: DataParallelEngine) -> None:
    engine.models[0].get_buffer(BIAS)[1] = -math.inf


SPOILERS = {
    f"model.{WEIGHT}": spoil_weight,
    f"optimizer.exp_avg_sq.{WEIGHT}": spoil_moment,
    f"model.{BIAS}": spoil_bias,
}


def after_update(number: int, what: Callable[[Any], None]) -> Callable[..., Tensor]:
    """An `_update` method that calls `what(engine)` after the update of step `number`."""
    update = DataParallelEngine._update

    def then(engine: DataParallelEngine, step: ScheduledStep, loss: Tensor, limits: StepLimits) -> Tensor:
        norm = update(engine, step, loss, limits)
        if step.number == number:
            what(engine)
        return norm

    return then


@pytest.mark.parametrize(("name", "step"), list(zip(SPOILERS, (3, 6, 5), strict=True)))
def test_a_bad_state_never_replaces_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    monkeypatch.setattr(DataParallelEngine, "_update", after_update(step, SPOILERS[name]))
    words = ["--set", "checkpoint.keep=1", "--set", "checkpoint.interval_steps=1"]
    result = dsv3("train", "--device", "cpu", "--config", write_run(tmp_path), *words)
    message = message_of(result)
    assert f"step {step}: after the update 1 tensor holds NaN or infinity: {name}." in message
    assert f"the last checkpoint is {tmp_path / 'checkpoints' / f'checkpoint_step_{step - 1}.pt'}" in message
    assert "Finished" not in result.output
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == [f"checkpoint_step_{step - 1}.pt"]


def test_an_update_without_bounds_saves_nothing(tmp_path: Path) -> None:
    words = ["training.optimizer.learning_rate=1e38", "training.schedule.warmup_steps=0"]
    words += ["checkpoint.interval_steps=1", "checkpoint.keep=1"]
    settings = [word for setting in words for word in ("--set", setting)]
    message = message_of(dsv3("train", "--device", "cpu", "--config", write_run(tmp_path), *settings))
    assert "step 1: after the update" in message
    assert "tensors hold NaN or infinity: model." in message
    assert "there is no checkpoint yet" in message
    assert "training.optimizer.learning_rate" in message
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_saves_no_bad_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil_and_stop(engine: DataParallelEngine) -> None:
        spoil_weight(engine)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DataParallelEngine, "_update", after_update(3, spoil_and_stop))
    message = message_of(dsv3("train", "--device", "cpu", "--config", write_run(tmp_path, steps=1000)))
    assert f"step 3: after the update 1 tensor holds NaN or infinity: model.{WEIGHT}" in message
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["checkpoint_step_2.pt"]


def bad_part_on_last_rank(path: Path, overrides: list[str]) -> str:
    """Trains a run in which a weight of the last rank becomes bad after step 3; returns this rank's error."""

    def on_last_rank(engine: DataParallelEngine) -> None:
        if engine.mesh.rank == engine.mesh.size - 1:
            spoil_weight(engine)

    update, DataParallelEngine._update = DataParallelEngine._update, after_update(3, on_last_rank)  # type: ignore[method-assign]
    try:
        parallel_runs.train_run(path, overrides, None)
    except TrainingError as error:
        return str(error)
    finally:
        DataParallelEngine._update = update  # type: ignore[method-assign]
    return "no error"


def test_all_ranks_refuse_a_part_that_is_bad_on_one(pool: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    open_tokens(load_config(path, []))
    overrides = ["parallel.data_shard=2", "checkpoint.interval_steps=1", "checkpoint.keep=1"]
    messages = pool.run(2, bad_part_on_last_rank, path, overrides)
    assert messages[0] == messages[1]
    assert f"after the update 1 tensor holds NaN or infinity: model.{WEIGHT}" in messages[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["checkpoint_step_2"]


def test_a_held_out_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are finite here; weights that are not would be named instead."""
    monkeypatch.setattr(Validator, "measure", lambda *_: ValidationLoss(math.nan, 256, 400.0, 8))
    result = dsv3("train", "--device", "cpu", "--config", write_run(tmp_path))
    message = message_of(result)
    assert "held-out loss after step 3: nan, with weights that are finite" in message
    assert f"the last checkpoint is {tmp_path / 'checkpoints' / 'checkpoint_step_2.pt'}" in message
    last = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["holdout_loss"] is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert dsv3("train", "--device", "cpu", "--config", write_run(folder)).exit_code == 0
    return folder


def test_quickstart_stops_at_such_a_loss_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Validator, "measure", lambda *_: ValidationLoss(math.nan, 256, 400.0, 8))
    message = message_of(dsv3("quickstart", "--config", write_run(tmp_path), "--runs", tmp_path / "runs"))
    assert "held-out loss after step 3: nan" in message


def test_a_loss_of_any_size_has_a_row() -> None:
    """The perplexity of a large loss may exceed the largest double."""
    table = Comparison(ValidationLoss(1000.0, 256, 400.0, 8), bigram=3.0, unigram=0.0).table()
    assert [list(column.cells) for column in table.columns] == [
        ["unigram", "bigram", "trained model"],
        ["0.0000", "3.0000", "1000.0000"],
        ["0.0000", "2.7700", "923.3248"],
        ["1.0", "20.1", "inf"],
    ]


class TestSavedByAnOlderVersion:
    """A bad checkpoint that an older version of this program has saved."""

    def bad(self, folder: Path, name: str) -> Path:
        state = load_checkpoint(folder / "checkpoints" / "checkpoint_step_4.pt")
        parts: Any = state
        section, name = name.split(".", 1)
        if section == "optimizer":
            moment, name = name.split(".", 1)
            parts = parts[section][moment]
        else:
            parts = parts[section]
        parts[name].view(-1)[0] = math.nan
        path = folder / "bad.pt"
        save_checkpoint(path, state)
        return path

    @pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "def "]], ids=["eval", "generate"])
    def test_commands_name_its_tensors(self, folder: Path, command: list[str]) -> None:
        path = self.bad(folder, f"model.{WEIGHT}")
        message = message_of(dsv3(*command, "--device", "cpu", "--checkpoint", path))
        assert f"{path}: 1 tensor holds NaN or infinity: {WEIGHT}; its training had diverged" in message
        assert "use an earlier checkpoint" in message

    @pytest.mark.parametrize("name", SPOILERS)
    def test_it_is_not_resumed(self, folder: Path, name: str) -> None:
        path = self.bad(folder, name)
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", path))
        assert f"{path}: 1 tensor holds NaN or infinity: {name}; its training had diverged" in message

    def test_finite_weights_whose_loss_is_no_number(self, folder: Path) -> None:
        state = load_checkpoint(folder / "checkpoints" / "checkpoint_step_4.pt")
        state["model"]["lm_head.weight"].fill_(3e38)
        save_checkpoint(folder / "huge.pt", state)
        message = message_of(dsv3("eval", "--device", "cpu", "--checkpoint", folder / "huge.pt"))
        assert "huge.pt: its held-out loss is nan, expected a number" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found_in_any_type(dtype: torch.dtype, bad: float) -> None:
    largest = torch.finfo(dtype).max
    tensors = {
        "good": torch.tensor([largest, -largest, 0.0], dtype=dtype),
        "none": torch.empty(0, dtype=dtype),
        "whole": torch.tensor([1, 2]),
        "bad": torch.zeros(40, 30, dtype=dtype),
    }
    assert non_finite(tensors) == []
    tensors["bad"][39, 29] = bad
    assert non_finite(tensors) == ["bad"]
    assert non_finite({}) == []


def test_a_message_names_the_first_tensors() -> None:
    assert non_finite_summary(["a"]) == "1 tensor holds NaN or infinity: a"
    assert non_finite_summary(list("abcdefg")) == "7 tensors hold NaN or infinity: a, b, c, d, e, …"

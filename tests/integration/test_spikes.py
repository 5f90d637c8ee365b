"""A spike is reported, skipped or rolled back on all ranks, and a run without one is not changed by the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.data import open_tokens
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import TrainingError
from helpers import deepspeed_runs, spiking_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

STEPS, SAVED, SPIKE = 9, 4, 6  # checkpoints after steps 4 and 8, a spike in step 6
LAYOUTS = {
    "FSDP 2": ["parallel.data_shard=2"],
    "EP 2": ["parallel.data_replicate=2", "parallel.expert=2"],
    "PP 2": ["parallel.pipeline=2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run whose corpus is tokenized."""
    path = write_run(tmp_path_factory.mktemp("run"), STEPS)
    open_tokens(load_config(path, []))
    return path


def recipe(folder: Path, action: str, *more: str) -> list[str]:
    return [
        f"training.spikes={{action: {action}, window: 4}}",
        f"checkpoint.interval_steps={SAVED}",
        f"checkpoint.directory={folder}/checkpoints",
        f"logging.directory={folder}/run",
        "training.evaluation.interval_steps=0",
        "training.optimizer.learning_rate=0.001",
        "training.optimizer.moments=float32",
        *more,
    ]


def state_of(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """The state in a checkpoint, without the config and what judges the next steps."""
    path = folder / "checkpoints" / f"checkpoint_step_{step}"
    saved = load_checkpoint(path if path.is_dir() else path.with_suffix(".pt"))
    return flatten({**saved, "config": {}, "recent_steps": {}})[0] | {"updates": saved["optimizer"]["num_steps"]}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text("utf-8").splitlines()]


Reference = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def without(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The last state of a run in one process that skips the given steps because they are not finite."""

    @cache
    def train(*skipped: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("without")
        factors = dict.fromkeys(skipped, math.nan)
        spiking_runs.train(run, recipe(folder, "ignore"), factors)
        return state_of(folder)

    return train


@pytest.mark.parametrize("action", ["warn", "skip", "rollback"])
def test_a_run_without_a_spike_is_the_same_bit_for_bit(
    run: Path, without: Reference, tmp_path: Path, action: str
) -> None:
    assert spiking_runs.train(run, recipe(tmp_path, action), {}) == (STEPS, 0, STEPS)
    assert_same(state_of(tmp_path), without())


def test_a_spike_is_reported_with_its_samples(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert spiking_runs.train(run, recipe(tmp_path, "warn"), {SPIKE: 100.0}) == (STEPS, 0, STEPS)
    assert "step 6: total loss" in caplog.text
    assert "training.spikes.action=skip would skip such steps" in caplog.text
    start, anomaly, end = events_of(tmp_path)
    assert (start["event"], end["event"], end["finished"]) == ("start", "end", True)
    assert (anomaly["event"], anomaly["step"], anomaly["kind"]) == ("anomaly", SPIKE, "spike")
    assert not anomaly["skipped"]
    assert anomaly["loss"] > anomaly["limits"]["loss"]
    assert [sample["sample"] for sample in anomaly["samples"]] == [20, 21, 22, 23]
    tokens = open_tokens(load_config(run, []))
    for sample in anomaly["samples"]:
        text = tokens.load_tokenizer().decode(tokens.read("train", sample["first_token"], 33).tolist())
        assert text.startswith(sample["documents"][0][:20])
        assert sample["files"][0].endswith(f":{sample['first_token']}-{sample['first_token'] + 33}")


def test_a_spike_is_skipped(run: Path, without: Reference, tmp_path: Path) -> None:
    assert spiking_runs.train(run, recipe(tmp_path, "skip"), {SPIKE: 100.0}) == (STEPS, 1, STEPS - 1)
    assert_same(state_of(tmp_path), without(SPIKE))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_spike_is_rolled_back(run: Path, without: Reference, tmp_path: Path, runs_ahead: bool) -> None:
    """The run ends as one that skips all steps from the checkpoint to the spike, and on a GPU the next one."""
    lost = range(SAVED + 1, SPIKE + 1 + runs_ahead)
    found = spiking_runs.train(run, recipe(tmp_path, "rollback"), {SPIKE: 100.0}, runs_ahead=runs_ahead)
    assert found == (STEPS, len(lost), STEPS - len(lost))
    assert_same(state_of(tmp_path), without(*lost))
    rollback = next(event for event in events_of(tmp_path) if event["event"] == "rollback")
    assert (rollback["step"], rollback["to_step"]) == (lost[-1], SAVED)


@pytest.mark.parametrize("resumed_at", [SAVED, 8])
def test_a_rolled_back_run_resumes_bit_for_bit(
    run: Path, without: Reference, tmp_path: Path, resumed_at: int
) -> None:
    """From before the spike, which is then rolled back again, and from after it."""
    overrides = recipe(tmp_path, "rollback")
    spiking_runs.train(run, overrides, {SPIKE: 100.0})
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        if int(path.stem.rsplit("_", 1)[1]) > resumed_at:
            path.unlink()
    assert spiking_runs.train(run, overrides, {SPIKE: 100.0}, "latest") == (STEPS, 2, STEPS - 2)
    assert_same(state_of(tmp_path), without(5, 6))


def test_the_next_spike_after_a_resume_is_judged_alike(run: Path, tmp_path: Path) -> None:
    """The window is part of a checkpoint: the first step after it can be a spike."""
    overrides = recipe(tmp_path, "skip")
    factors = {SAVED + 2: 100.0}
    spiking_runs.train(run, overrides, factors)
    expected = state_of(tmp_path)
    for step in (8, STEPS):
        (tmp_path / "checkpoints" / f"checkpoint_step_{step}.pt").unlink()
    assert spiking_runs.train(run, overrides, factors, "latest") == (STEPS, 1, STEPS - 1)
    assert_same(state_of(tmp_path), expected)


def test_too_many_rollbacks_stop_the_run(run: Path, tmp_path: Path) -> None:
    overrides = recipe(tmp_path, "rollback", "training.spikes.max_rollbacks=1")
    with pytest.raises(TrainingError, match="step 8: a spike again after 1 rollbacks"):
        spiking_runs.train(run, overrides, {SPIKE: 100.0, SPIKE + 2: 100.0})
    assert [event["event"] for event in events_of(tmp_path)][-3:] == ["rollback", "anomaly", "failure"]


def test_without_a_checkpoint_only_the_spike_is_skipped(
    run: Path, without: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = recipe(tmp_path, "rollback", "checkpoint.interval_steps=0")
    assert spiking_runs.train(run, overrides, {SPIKE: 100.0}) == (STEPS, 1, STEPS - 1)
    assert "there is no checkpoint to roll back to yet" in caplog.text
    assert_same(state_of(tmp_path), without(SPIKE))


def test_spikes_count_towards_skipped_steps_in_a_row(run: Path, tmp_path: Path) -> None:
    overrides = [f"--set={each}" for each in recipe(tmp_path, "skip", "training.max_skipped_steps=0")]
    with pytest.MonkeyPatch.context() as patch:
        spoil_all(patch, {SPIKE: 100.0})
        message = message_of(dsv3("train", "--device", "cpu", "--config", run, *overrides))
    assert "a spike, above" in message
    assert "training.max_skipped_steps = 0" in message


def spoil_all(patch: pytest.MonkeyPatch, factors: Mapping[int, float]) -> None:
    from deepseek_v3.training.parallel.data_parallel import DataParallelEngine

    backward = DataParallelEngine._backward

    def spoiled(engine: Any, batches: Any, step: Any) -> Any:
        losses = backward(engine, batches, step)
        return losses._replace(total=losses.total * factors.get(step.number, 1.0))

    patch.setattr(DataParallelEngine, "_backward", spoiled)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_roll_back(pool: RankPool, run: Path, without: Reference, tmp_path: Path, layout: str) -> None:
    overrides = recipe(tmp_path, "rollback", *LAYOUTS[layout])
    found = pool.run(2, spiking_runs.train, run, overrides, {SPIKE: 100.0})
    assert found == [(STEPS, 2, STEPS - 2)] * 2
    assert_close(state_of(tmp_path), without(5, 6))


def test_all_ranks_roll_back_under_deepspeed(
    deepspeed_pool: RankPool, run: Path, without: Reference, tmp_path: Path
) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": 2}})
    overrides = recipe(tmp_path, "rollback")
    found = deepspeed_pool.run(2, spiking_runs.train, run, overrides, {SPIKE: 100.0}, None, file)
    assert found == [(STEPS, 2, STEPS - 2)] * 2
    assert_close(state_of(tmp_path), without(5, 6))


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Other layouts add in another order."""
    assert found["updates"] == expected["updates"]
    for name, value in expected.items():
        if name.startswith("model."):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

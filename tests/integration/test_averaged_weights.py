"""The average of the weights: the same under every layout, resumed bit for bit, used by eval and export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.interop.huggingface.pretrained_folder import load_pretrained
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.parallel.build import build_engine
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.monitoring import read_metrics
from helpers import deepspeed_runs, spiking_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")
STEPS, DECAY = 4, 0.5
LAYOUTS = {
    "FSDP 2": ["parallel.data_shard=2"],
    "FSDP 2, ZeRO 1": ["parallel.data_shard=2", "parallel.zero_stage=1"],
    "EP 2": ["parallel.data_replicate=2", "parallel.expert=2"],
    "PP 2": ["parallel.pipeline=2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run whose corpus is tokenized."""
    path = write_run(tmp_path_factory.mktemp("run"), STEPS)
    open_tokens(load_config(path, []))
    return path


def recipe(folder: Path, *more: str, decay: float | None = DECAY) -> list[str]:
    return [
        f"training.optimizer.ema_decay={'null' if decay is None else decay}",
        "training.evaluation.interval_steps=2",
        "training.optimizer.moments=float32",
        "checkpoint.interval_steps=2",
        f"checkpoint.directory={folder}/checkpoints",
        f"logging.directory={folder}/run",
        *more,
    ]


def state_of(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    path = folder / "checkpoints" / f"checkpoint_step_{step}"
    return flatten({**load_checkpoint(path if path.is_dir() else path.with_suffix(".pt")), "config": {}})[0]


def held_out(folder: Path, name: str) -> list[float]:
    return [each[name] for each in read_metrics(folder / "run" / "metrics.jsonl") if "holdout_loss" in each]


def is_average(name: str) -> bool:
    return name.startswith("optimizer.ema.")


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process that keeps an average."""
    folder = tmp_path_factory.mktemp("alone")
    spiking_runs.train(run, recipe(folder, "checkpoint.interval_steps=1"), {})
    return folder


def test_each_step_moves_the_average_towards_the_weights(run: Path, alone: Path) -> None:
    states = [state_of(alone, step) for step in range(1, STEPS + 1)]
    averages = [{name: state[name] for name in state if is_average(name)} for state in states]
    assert {name.removeprefix("optimizer.ema.") for name in averages[0]} == {
        name.removeprefix("optimizer.exp_avg.") for name in states[0] if name.startswith("optimizer.exp_avg.")
    }
    for before, after, state in zip(averages, averages[1:], states[1:], strict=False):
        for name, average in after.items():
            weight = state[f"model.{name.removeprefix('optimizer.ema.')}"]
            torch.testing.assert_close(average, before[name] * DECAY + weight * (1 - DECAY))


def test_an_average_changes_nothing_else_of_the_run(run: Path, alone: Path, tmp_path: Path) -> None:
    """And it is not there by default."""
    spiking_runs.train(run, recipe(tmp_path, decay=None), {})
    without, expected = state_of(tmp_path), state_of(alone)
    assert without.keys() == {name for name in expected if not is_average(name)}
    assert all(tensor.equal(expected[name]) for name, tensor in without.items())
    assert held_out(tmp_path, "holdout_loss") == held_out(alone, "holdout_loss")[-2:]


def test_a_skipped_step_moves_no_average(run: Path, tmp_path: Path) -> None:
    spiking_runs.train(run, recipe(tmp_path), {3: float("nan"), 4: float("nan")})
    before, after = state_of(tmp_path, 2), state_of(tmp_path, 4)
    assert all(tensor.equal(before[name]) for name, tensor in after.items() if is_average(name))


def test_it_resumes_bit_for_bit(run: Path, alone: Path, tmp_path: Path) -> None:
    start = alone / "checkpoints" / "checkpoint_step_2.pt"
    spiking_runs.train(run, recipe(tmp_path), {}, str(start))
    resumed, expected = state_of(tmp_path), state_of(alone)
    assert resumed.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in resumed.items())


def test_a_resumed_run_may_begin_or_drop_an_average(run: Path, alone: Path, tmp_path: Path) -> None:
    start = str(alone / "checkpoints" / "checkpoint_step_2.pt")
    spiking_runs.train(run, recipe(tmp_path / "off", decay=None), {}, start)
    off = state_of(tmp_path / "off")
    assert not any(map(is_average, off))
    half = tmp_path / "off" / "checkpoints" / f"checkpoint_step_{STEPS}.pt"
    more = f"training.total_tokens={(STEPS + 1) * 128}"
    spiking_runs.train(run, recipe(tmp_path / "on", more), {STEPS + 1: float("nan")}, str(half))
    on = state_of(tmp_path / "on", STEPS + 1)
    averages = {name.removeprefix("optimizer.ema."): tensor for name, tensor in on.items() if is_average(name)}
    assert averages
    assert all(tensor.equal(off[f"model.{name}"]) for name, tensor in averages.items())


@pytest.fixture(scope="module")
def reference(alone: Path) -> Callable[[], tuple[dict[str, Tensor], list[float]]]:
    return cache(lambda: (state_of(alone), held_out(alone, "ema_holdout_loss")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_same_average(
    pool: RankPool, run: Path, reference: Callable[[], Any], tmp_path: Path, layout: str
) -> None:
    pool.run(2, spiking_runs.train, run, recipe(tmp_path, *LAYOUTS[layout]), {})
    found, (expected, losses) = state_of(tmp_path), reference()
    assert {name for name in found if is_average(name)} == {name for name in expected if is_average(name)}
    for name in filter(is_average, expected):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=2e-3)
    assert held_out(tmp_path, "ema_holdout_loss") == pytest.approx(losses[-2:], rel=1e-3)
    assert held_out(tmp_path, "ema_holdout_loss")[0] != held_out(tmp_path, "holdout_loss")[0]


def test_evaluation_and_export_use_the_average(alone: Path, tmp_path: Path) -> None:
    checkpoint = alone / "checkpoints" / f"checkpoint_step_{STEPS}.pt"
    expected = state_of(alone)
    weights = load_model(checkpoint, CPU, averaged=True).model.state_dict()
    for name, tensor in weights.items():
        assert tensor.equal(expected.get(f"optimizer.ema.{name}", expected[f"model.{name}"])), name
    result = dsv3("export", checkpoint, tmp_path / "hf", "--ema", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    exported = load_pretrained(tmp_path / "hf").state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in exported.items())
    found = dsv3("eval", "--checkpoint", checkpoint, "--ema", "--device", "cpu", "--tokens", 256)
    assert found.exit_code == 0, found.output
    assert f"{held_out(alone, 'ema_holdout_loss')[-1]:.4f}" in found.output


def test_without_an_average_there_is_one_line(run: Path, tmp_path: Path) -> None:
    spiking_runs.train(run, recipe(tmp_path, decay=None), {})
    checkpoint = tmp_path / "checkpoints" / f"checkpoint_step_{STEPS}.pt"
    message = message_of(dsv3("export", checkpoint, tmp_path / "hf", "--ema"))
    assert "holds no averages of its weights, which a run keeps with training.optimizer.ema_decay" in message


def test_deepspeed_refuses_it(run: Path, tmp_path: Path) -> None:
    config = load_config(run, [f"training.optimizer.ema_decay={DECAY}"])
    file = DeepSpeedFile(deepspeed_runs.write_settings(tmp_path, {}))
    with pytest.raises(ConfigError, match="DeepSpeed keeps no average"):
        build_engine(config, ParallelMesh(config.parallel), CPU, lambda _: None, file)  # type: ignore[arg-type]

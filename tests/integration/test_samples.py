"""Samples that a model writes during training are shown when due and change nothing else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.samples import check_samples_config
from deepseek_v3.training.train import train_run
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.distributed.launch import ALONE
from deepseek_v3.utils.errors import ConfigError, GenerationError
from helpers.runs import dsv3, message_of, write_run

SAMPLES = "logging.samples={prompts: ['def a', ''], interval_steps: 2, max_new_tokens: 5}"


def train(path: Path, name: str, *overrides: str) -> tuple[str, Path]:
    """Trains in folders of this name; returns the output and the last checkpoint."""
    folder = path.parent / name
    places = [f"checkpoint.directory={folder}", f"logging.directory={folder / 'run'}", *overrides]
    words = [word for place in places for word in ("--set", place)]
    result = dsv3("train", "--device", "cpu", "--config", path, *words)
    assert result.exit_code == 0, result.output
    return result.output, folder / "checkpoint_step_6.pt"


def tensors_of(state: object, name: str = "") -> dict[str, object]:
    if isinstance(state, dict):
        pairs = ((f"{name}.{key}", value) for key, value in state.items() if key != "config")
        return {leaf: found for key, value in pairs for leaf, found in tensors_of(value, key).items()}
    return {name: state}


def test_samples_are_shown_when_due_and_change_no_bit(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    plain, without = train(path, "plain")
    output, with_samples = train(path, "samples", SAMPLES)
    assert "[Samples]" not in plain
    found = re.findall(r"^\[Samples\] After step (\d), '(.*)' continues:$", output, re.MULTILINE)
    assert found == [(step, prompt) for step in "246" for prompt in ("def a", "")]
    one, other = (tensors_of(load_checkpoint(file)) for file in (without, with_samples))
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name
    assert any("random" in name or "rng" in name for name in one)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_the_run_and_its_samples_count_the_same_bytes(tmp_path: Path, in_fp8: bool) -> None:
    wide = ["model.kv_lora_rank=128", f"model.use_fp8_kv={str(in_fp8).lower()}"]
    text = " ".join(train(write_run(tmp_path, steps=2), "run", SAMPLES, *wide)[0].split())
    announced = re.findall(r"([\d,]+) bytes per token, multi-head attention would need ([\d,]+)", text)
    allocated = re.findall(r"([\d,]+) bytes per token; multi-head attention would take ([\d,]+),", text)
    assert announced == allocated == [("280", "160") if in_fp8 else ("1,056", "320")]


def test_a_run_resumes_with_samples_that_it_did_not_have(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    train(path, "run")
    words = ["--set", f"checkpoint.directory={tmp_path / 'run'}", "--set", "training.total_tokens=1024"]
    result = dsv3("train", "--device", "cpu", "--config", path, *words, "--set", SAMPLES, "--resume", "latest")
    assert result.exit_code == 0, result.output
    assert "After step 8, 'def a' continues:" in result.output


@pytest.mark.parametrize(("processes", "by_deepspeed"), [(2, False), (8, False), (1, True)])
def test_samples_of_several_processes_are_refused(tmp_path: Path, processes: int, by_deepspeed: bool) -> None:
    config = load_config(write_run(tmp_path), [SAMPLES])
    with pytest.raises(ConfigError, match=r"logging\.samples is given, .* set it to null, .* dsv3 generate"):
        check_samples_config(config, processes, by_deepspeed)
    check_samples_config(config, 1, by_deepspeed=False)
    check_samples_config(load_config(tmp_path / "run.yaml"), processes, by_deepspeed)


def test_several_ranks_refuse_samples_before_anything_is_built(tmp_path: Path) -> None:
    sharded = ["parallel.data_shard=2"]
    config = load_config(write_run(tmp_path), [SAMPLES, *sharded])
    with pytest.raises(ConfigError, match="this run has 2 processes: expected one process"):
        train_run(config, torch.device("cpu"), world=replace(ALONE, size=2))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("{prompts: []}", "logging.samples.prompts"),
        ("{prompts: [a], interval_steps: 0}", "logging.samples.interval_steps"),
        ("{prompts: [a], max_new_tokens: 0}", "logging.samples.max_new_tokens"),
        ("{prompts: ['" + "def x " * 200 + "']}", "tokens, expected fewer than model.max_position_embeddings = 64"),
    ],
)
def test_samples_that_cannot_be_are_refused_at_start(tmp_path: Path, samples: str, message: str) -> None:
    words = ["--config", write_run(tmp_path), "--set", f"logging.samples={samples}"]
    assert message in message_of(dsv3("train", "--device", "cpu", *words))


def test_a_sample_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise GenerationError("the logits are not finite")

    monkeypatch.setattr("deepseek_v3.inference.generator.Generator.generate", fail)
    output, checkpoint = train(write_run(tmp_path), "run", SAMPLES)
    assert "[Samples] warning: no samples after step 2: the logits are not finite" in output
    assert checkpoint.exists()

"""Models in checkpoint folders: saved by sharded data parallel, loaded by one process, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from typer import Typer
from typer.testing import CliRunner

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.generate import generate
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.model.pretrained import checkpoint_config, model_entries
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, load_checkpoint, save_checkpoint
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter, load_sharded
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.errors import CheckpointError
from helpers.models import fill_with_noise, small_config, small_model
from helpers.rank_pool import RankPool

CPU = torch.device("cpu")


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat\n"] * 3, vocab_size=280)


def config() -> RunConfig:
    model = small_config(vocab_size=tokenizer().vocab_size, max_position_embeddings=32)
    sections: dict[str, Any] = {
        "model": model.model_dump(),
        "training": {
            "total_tokens": 1000,
            "sequence_length": 16,
            "global_batch_size": 1,
            "optimizer": {"learning_rate": 0.001},
        },
        "data": {"path": "x"},
        "logging": {"directory": "x"},
    }
    return config_from_dict(sections, "test")


def noisy_model() -> DeepSeekV3:
    torch.manual_seed(0)
    return small_model(config().model)


def state_of(model: DeepSeekV3) -> dict[str, Any]:
    return {**model_entries(model.state_dict(), config(), tokenizer()), "step": 7, "tokens": 112}


def shard(model: DeepSeekV3) -> DeepSeekV3:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def sharded_both_ways(folder: Path) -> None:
    """Saves a sharded model as a folder, and loads the file of the test into another model."""
    group = checkpoint_group()
    with ShardedWriter(CheckpointDirectory(folder / "out", keep=1), group) as writer:
        writer.save(7, state_of(shard(noisy_model())))
    other = shard(DeepSeekV3(config().model))
    tensors, _ = flatten({"model": other.state_dict()})
    load_sharded(folder / "in" / "checkpoint_step_7.pt", tensors, group)
    expected = noisy_model().state_dict()
    for name, value in other.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, expected[name]), name


@pytest.fixture(scope="module")
def checkpoints(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in` with a file that one process saved, `out` with a folder that three ranks saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    CheckpointDirectory(folder / "in", keep=1).save(7, state_of(noisy_model()))
    pool.run(3, sharded_both_ways, folder)
    return folder


@pytest.mark.parametrize("place", ["out", "out/checkpoint_step_7"])
def test_one_process_runs_the_model_of_a_folder(place: str, checkpoints: Path) -> None:
    saved, alone = load_model(checkpoints / place, CPU), load_model(checkpoints / "in", CPU)
    assert (saved.step, saved.tokens, saved.config) == (7, 112, config())
    assert saved.tokenizer.to_json() == tokenizer().to_json()
    tokens_BS = torch.arange(12).view(2, 6)
    assert torch.equal(saved.model(tokens_BS), alone.model(tokens_BS))


def test_the_command_generates_from_a_folder(checkpoints: Path) -> None:
    app = Typer()
    app.command("generate")(generate)
    options = ["--prompt", "the", "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"]
    outputs = []
    for place in ("out", "out/checkpoint_step_7", "in"):
        result = CliRunner().invoke(app, ["--checkpoint", str(checkpoints / place), *options])
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert outputs[0]
    assert outputs[0] == outputs[1] == outputs[2]


def test_other_formats_are_refused(checkpoints: Path) -> None:
    path = checkpoints / "in" / "checkpoint_step_7.pt"
    state = load_checkpoint(path)
    assert checkpoint_config(state, path) == config()
    for other in (1, 3, 0, None, "2"):
        with pytest.raises(
            CheckpointError, match=r"has checkpoint format .*, this version reads format 2 only; load it with"
        ):
            checkpoint_config({**state, "format": other}, path)


def test_moments_in_a_list_as_of_format_1_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    state = load_checkpoint(checkpoints / "in" / "checkpoint_step_7.pt")
    path = tmp_path / "checkpoint_step_7.pt"
    old = {"format": 1, "optimizer": {"num_steps": 3, "moments": [{"exp_avg": torch.zeros(2)}]}}
    save_checkpoint(path, {**state, **old})
    for read in (open_checkpoint, lambda path: load_model(path, CPU)):
        with pytest.raises(
            CheckpointError,
            match=r"state\['optimizer'\]\['moments'\]\[0\].*checkpoint format 2 does not",
        ):
            read(path)


def test_a_model_with_other_tensors_is_refused(checkpoints: Path) -> None:
    model = DeepSeekV3(config().model)
    fill_with_noise(model)
    tensors, _ = flatten({"model": model.state_dict()})
    norm = tensors.pop("model.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"has the tensor 'model.model.norm.weight'"):
        load_sharded(checkpoints / "out" / "checkpoint_step_7", tensors, None)
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.norm.weight', which is needed here"):
        load_sharded(checkpoints / "out" / "checkpoint_step_7", {**tensors, "model.norm.weight": norm}, None)

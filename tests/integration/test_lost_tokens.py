"""A run that loses its token shards saves its last step, stops on all ranks, and can be resumed."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.evaluation import perplexity
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.errors import DataError
from helpers import parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

STEPS = 9
CPU = torch.device("cpu")
# Only the last checkpoint is due, so any other is saved because tokens were lost.
SETTINGS = ["checkpoint.interval_steps=0", "training.evaluation.interval_steps=4"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path, STEPS)
    open_tokens(load_config(path))
    return path


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_run_whose_shards_shrink_saves_and_resumes_later(tmp_path: Path, run: Path, split: str) -> None:
    config = load_config(run, SETTINGS)
    files = list((config.data.path / split).iterdir())
    contents = [file.read_bytes() for file in files]

    def lose(step: int) -> None:
        for file in files if step == 3 else []:
            os.truncate(file, 9)

    trainer = Trainer(config, CPU, step_begins=lose)
    with pytest.raises(DataError) as caught:
        trainer.run()
    step = trainer._steps_done
    # Batches that were prefetched before step 3 may still be trained on.
    assert step in ((3, 4, 5) if split == "train" else (4,))
    saved = config.checkpoint.directory / f"checkpoint_step_{step}.pt"
    assert f"{files[0]}: has become shorter while it was in use" in str(caught.value)
    assert f"stopped after step {step} and saved {saved}; continue with --resume latest" in str(caught.value)
    assert load_checkpoint(saved)["step"] == step

    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert Trainer(config, CPU, "latest").run().finished
    elsewhere = [*SETTINGS, f"checkpoint.directory={tmp_path / 'whole'}", f"logging.directory={tmp_path / 'log'}"]
    whole = load_checkpoint(Trainer(load_config(run, elsewhere), CPU).run().checkpoint)
    resumed = load_checkpoint(config.checkpoint.directory / f"checkpoint_step_{STEPS}.pt")
    assert all(tensor.equal(resumed["model"][name]) for name, tensor in whole["model"].items())


@pytest.mark.parametrize("removed_in", [0, 3])
def test_a_run_whose_shards_are_removed_goes_on(run: Path, removed_in: int) -> None:
    config = load_config(run, SETTINGS)
    trainer = Trainer(config, CPU, step_begins=lambda step: step == removed_in and shutil.rmtree(config.data.path))
    if removed_in == 0:
        shutil.rmtree(config.data.path)
    assert trainer.run().finished


def test_shards_that_are_lost_before_the_first_step(run: Path) -> None:
    config = load_config(run, SETTINGS)
    trainer = Trainer(config, CPU)
    for file in (config.data.path / "train").iterdir():
        os.truncate(file, 0)
    with pytest.raises(DataError, match=r"00000\.bin: has become shorter while it was in use: it holds 0 bytes"):
        trainer.run()
    assert not config.checkpoint.directory.exists()


def test_an_evaluation_whose_shards_are_lost(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run, SETTINGS)
    Trainer(config, CPU).run()
    counted = perplexity.compare_with_ngrams

    def lose_then_count(*arguments: Any) -> Any:
        for file in (config.data.path / "train").iterdir():
            os.truncate(file, 9)
        return counted(*arguments)

    monkeypatch.setattr(perplexity, "compare_with_ngrams", lose_then_count)
    message = message_of(dsv3("eval", "--device", "cpu", "--checkpoint", config.checkpoint.directory))
    assert "train/00000.bin: has become shorter while it was in use" in message


@pytest.mark.parametrize(
    ("layout", "split", "loses"),
    [
        (["parallel.data_shard=2"], "train", 1),
        (["parallel.data_shard=2"], "holdout", 0),
        (["parallel.pipeline=2"], "train", 1),
    ],
)
def test_ranks_stop_after_the_same_step_when_one_loses_tokens(
    pool: RankPool, run: Path, layout: list[str], split: str, loses: int
) -> None:
    overrides = [*SETTINGS, *layout]
    results = pool.run(2, parallel_runs.train_until_tokens_are_lost, run, overrides, split, loses)
    assert results[0] == results[1]
    step, message = results[0]
    saved = load_config(run, overrides).checkpoint.directory / f"checkpoint_step_{step}"
    assert f"tokens of rank {loses}/{split}/00000.bin: has become shorter" in message
    assert f"stopped after step {step} and saved {saved}" in message
    assert load_checkpoint(saved)["step"] == step

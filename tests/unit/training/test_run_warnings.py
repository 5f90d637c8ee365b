"""What a run seldom means to do is said in one line, and nothing is said of a run that is as it should be."""

from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.run_warnings import warn_of_unusual_settings
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.training.trainer import Trainer
from helpers.runs import SEQUENCE_LENGTH, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("run"))
    open_tokens(load_config(path))
    return path


def warnings_of(run: Path, caplog: pytest.LogCaptureFixture, *overrides: str) -> list[str]:
    config = load_config(run, ["model.vocab_size=280", "data.corpus.vocab_size=280", *overrides])
    shards = open_tokens(config)
    caplog.clear()
    warn_of_unusual_settings(config, TrainingSchedule(config), shards)
    return caplog.messages


def test_a_run_as_it_should_be_is_said_nothing_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(run, caplog) == []


def test_more_than_four_epochs(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = open_tokens(load_config(run))
    windows = (shards.num_tokens("train") - 1) // SEQUENCE_LENGTH
    available = windows * SEQUENCE_LENGTH
    assert warnings_of(run, caplog, f"training.total_tokens={4 * available}") == []
    (line,) = warnings_of(run, caplog, f"training.total_tokens={19 * available}")
    assert f"{19 * available:,} tokens is 19.0 epochs over the {available:,} training tokens" in line


def test_a_warm_up_as_long_as_the_run(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(run, caplog, "training.schedule.warmup_steps=5") == []
    (line,) = warnings_of(run, caplog, "training.schedule.warmup_steps=12")
    assert "warmup_steps = 12 leaves nothing of the run of 6 steps" in line
    assert "reaches 50% of" in line


def test_a_tokenizer_far_smaller_than_the_vocabulary(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = open_tokens(load_config(run)).index.vocab_size
    assert warnings_of(run, caplog, f"model.vocab_size={known + 127}") == []
    (line,) = warnings_of(run, caplog, "model.vocab_size=560")
    assert f"has {known} ids and model.vocab_size is 560: {560 - known} rows" in line


def test_shards_that_were_built_otherwise(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warnings_of(run, caplog, "data.corpus.fim_rate=0.5", "data.corpus.seed=3")
    assert "is used as it was built, with fim_rate = 0.0 where data.corpus says 0.5; seed = 0 where data" in line


def test_a_trainer_says_it_once_at_its_start(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(load_config(run, ["training.schedule.warmup_steps=12"]), torch.device("cpu"))
    assert sum("warmup_steps = 12 leaves nothing" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("option", "because", "used"),
    [
        ("gradient_reduction=fp8", "with one data-parallel rank", ["data_shard=2"]),
        ("dispatch_precision=fp8", "with parallel.expert = 1", ["data_shard=2", "expert=2"]),
        ("fp8_scales=power_of_two", "nothing in FP8", ["precision=fp8"]),
        ("fp8_scales=power_of_two", "nothing in FP8", ["data_shard=2", "expert=2", "dispatch_precision=fp8"]),
    ],
)
def test_an_option_that_the_layout_has_no_use_for(
    run: Path, caplog: pytest.LogCaptureFixture, option: str, because: str, used: list[str]
) -> None:
    plain = ["parallel.precision=fp32", f"parallel.{option}"]
    (line,) = warnings_of(run, caplog, *plain)
    assert f"parallel.{option.replace('=', ' = ')} changes nothing: " in line
    assert because in line
    assert warnings_of(run, caplog, *plain, *(f"parallel.{each}" for each in used)) == []

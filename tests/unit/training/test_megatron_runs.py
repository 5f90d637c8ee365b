"""A run on Megatron-LM datasets is the run on token shards of the same text, and resumes on the same data only."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import CheckpointError, DataError
from helpers.megatron import their_write
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")
SHORT = ["training.evaluation.interval_steps=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with token shards at `tokens`, and their text as Megatron-LM datasets at `train` and `holdout`."""
    folder = tmp_path_factory.mktemp("run")
    path = write_run(folder, steps=3)
    shards = open_tokens(load_config(path))
    assert isinstance(shards, TokenShards)
    for split in ("train", "holdout"):
        tokens = shards.read(split, 0, shards.num_tokens(split))
        ends = np.flatnonzero(tokens == shards.end_of_text) + 1
        their_write(folder / split, [[part.tolist()] for part in np.split(tokens, ends)[:-1]], "uint16")
    shards.load_tokenizer().save(folder / "tokenizer.json")
    return path


def megatron(folder: Path, *more: str) -> list[str]:
    files = [f"data.path={folder / 'train'}", f"data.holdout_path={folder / 'holdout'}", "data.corpus=null"]
    return [
        *files,
        f"checkpoint.directory={folder / 'other'}",
        f"logging.directory={folder / 'log'}",
        *SHORT,
        *more,
    ]


def test_the_run_is_that_on_shards_bit_for_bit(run: Path) -> None:
    results = [Trainer(load_config(run, options), CPU).run() for options in (SHORT, megatron(run.parent))]
    one, other = (flatten(load_checkpoint(result.checkpoint))[0] for result in results)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results[0].validation == results[1].validation

    evaluated = dsv3("eval", "--checkpoint", results[1].checkpoint, "--tokens", 256, "--device", "cpu")
    assert evaluated.exit_code == 0, evaluated.output
    assert str(run.parent / "train") in evaluated.output

    resumed = [*megatron(run.parent), "training.total_tokens=512"]
    with pytest.raises(CheckpointError, match=r"was trained on other tokens than those in .*tokens; a resumed run"):
        Trainer(
            load_config(run, [*resumed, f"data.path={run.parent / 'tokens'}", "data.holdout_path=null"]),
            CPU,
            "latest",
        )
    assert Trainer(load_config(run, resumed), CPU, "latest").run().step == 4


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_dataset_that_shrinks_ends_the_run_with_a_checkpoint(run: Path, tmp_path: Path, split: str) -> None:
    for file in run.parent.glob("*[nt].[bi][id][nx]"):
        shutil.copy(file, tmp_path)
    shutil.copy(run.parent / "tokenizer.json", tmp_path)
    config = load_config(
        run, megatron(tmp_path, "training.evaluation.interval_steps=2", "training.total_tokens=1280")
    )
    trainer = Trainer(config, CPU, step_begins=lambda step: step == 2 and os.truncate(tmp_path / f"{split}.bin", 9))
    with pytest.raises(DataError, match=rf"{split}\.bin: has become shorter .* and saved .*checkpoint_step_"):
        trainer.run()


def test_a_vocabulary_left_open_follows_the_tokenizer(run: Path, tmp_path: Path) -> None:
    known = open_tokens(load_config(run)).vocab_size
    options = ["model.vocab_size=null", *megatron(run.parent)]
    assert load_config(run, options).model.vocab_size == -(-known // 128) * 128
    named = [*options, f"data.tokenizer={run.parent / 'tokens'}", f"data.path={tmp_path / 'nothing'}"]
    assert load_config(run, named).model.vocab_size == -(-known // 128) * 128
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    assert load_config(run, [*named, f"data.tokenizer={tmp_path}"]).model.vocab_size == 129_280
    with pytest.raises(DataError, match=r"its tokenizer has .* ids, model\.vocab_size = 256 has room for fewer"):
        open_tokens(load_config(run, megatron(run.parent, "model.vocab_size=256")))


def test_bad_options_end_in_one_line(run: Path, tmp_path: Path) -> None:
    words = ["train", "--config", run, "--device", "cpu", "--set"]
    both = message_of(dsv3(*words, "data={holdout: 0.1, holdout_path: x}"))
    assert "data: holdout = 0.1 and holdout_path = x: expected one of the two" in both
    assert "data.holdout: found 1: expected" in message_of(dsv3(*words, "data.holdout=1"))
    with pytest.raises(DataError, match="nowhere: no token shards here, and no Megatron-LM dataset; write"):
        open_tokens(load_config(run, megatron(run.parent, "data.path=nowhere")))
    their_write(tmp_path / "train")
    (tmp_path / "train.idx").unlink()
    (tmp_path / "tokenizer.json").write_bytes((run.parent / "tokenizer.json").read_bytes())
    for path in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"train\.idx: does not exist; expected both"):
            open_tokens(load_config(run, [f"data.path={path}", "data.corpus=null"]))


def test_tokenize_writes_datasets_that_train(run: Path, tmp_path: Path) -> None:
    words = ["tokenize", "--input", run.parent / "text", "--vocab-size", 280, "--sequence-length", 32]
    result = dsv3(*words, "--format", "megatron", "--output", tmp_path / "tokens", "--holdout", 0.2)
    assert result.exit_code == 0, result.output
    assert "training tokens in" in result.output
    config = load_config(run, [f"data.path={tmp_path / 'tokens'}", "data.corpus=null", *SHORT])
    tokens = open_tokens(config)
    assert tokens.name == str(tmp_path / "tokens" / "train")
    assert tokens.num_tokens("holdout") > 32

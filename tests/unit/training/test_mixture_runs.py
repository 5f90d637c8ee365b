"""A run on several weighted sources: its shares, its held-out losses, how it resumes, and what it refuses."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from deepseek_v3.config.loading import config_from_dict, load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenize_corpus import TokenFormat, tokenize_corpus
from deepseek_v3.evaluation.ngrams import ngram_losses
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.training.validation import ValidationWindows, Validator
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from deepseek_v3.utils.monitoring import read_metrics
from helpers.runs import SEQUENCE_LENGTH, TOKENS_PER_STEP, dsv3, run_fields, write_corpus

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with two sources: token shards of code, and Megatron-LM datasets of numbers in words."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder / "text")
    (folder / "words.txt").write_text(" ".join(f"{i} and {i * i};" for i in range(3000)))
    options = {"holdout": 0.2, "fim_rate": 0.0, "seed": 0, "sequence_length": SEQUENCE_LENGTH}
    tokenize_corpus(str(folder / "text"), folder / "code", vocab_size=280, tokenizer=None, **options)
    options["token_format"] = TokenFormat.MEGATRON
    known = folder / "code" / "tokenizer.json"
    tokenize_corpus(str(folder / "words.txt"), folder / "words", vocab_size=None, tokenizer=known, **options)
    fields = run_fields(folder, STEPS)
    fields["data"] = {
        "sources": [
            {"name": "code", "path": str(folder / "code"), "weight": 3},
            {"name": "words", "path": str(folder / "words"), "weight": 1},
        ]
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def config_of(run: Path, name: str, *overrides: str) -> RunConfig:
    """The config of the run with output folders of its own."""
    folder = run.parent / name
    return load_config(run, [f"checkpoint.directory={folder}/saved", f"logging.directory={folder}/log", *overrides])


def with_sources(run: Path, *changes: dict[str, object]) -> str:
    sources = yaml.safe_load(run.read_text())["data"]["sources"]
    return f"data.sources={json.dumps([source | change for source, change in zip(sources, changes, strict=True)])}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return flatten(load_checkpoint(path))[0]


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The last checkpoint of an uninterrupted run."""
    return Trainer(config_of(run, "whole"), CPU).run().checkpoint


def test_metrics_have_the_loss_of_every_source(run: Path, whole: Path) -> None:
    config = config_of(run, "whole")
    records = read_metrics(config.logging.directory / "metrics.jsonl")
    measured = [record for record in records if "holdout_loss" in record]
    assert [record["step"] for record in measured] == [3, 4]
    for record in measured:
        losses = [record[f"holdout_loss/{name}"] for name in ("code", "words")]
        assert record["holdout_loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
        assert losses[0] != losses[1]
        shares = [record[f"holdout_mtp_acceptance_1/{name}"] for name in ("code", "words")]
        assert record["holdout_mtp_acceptance_1"] == pytest.approx(0.75 * shares[0] + 0.25 * shares[1])
        assert shares[0] != shares[1]
    last, tokens = measured[-1], open_tokens(config)
    trainer = Trainer(config, CPU, str(whole))
    found = []
    for part in tokens.parts:
        alone = Validator(part.source, config, config.training.evaluation.tokens // 2)
        found.append(alone.measure(trainer.engine.evaluate, CPU))
        assert last[f"holdout_loss/{part.name}"] == pytest.approx(found[-1].loss)
        assert last[f"holdout_bits_per_byte/{part.name}"] == pytest.approx(found[-1].bits_per_byte)
    bytes_per_token = sum(w * each.num_bytes / each.tokens for w, each in zip((0.75, 0.25), found, strict=True))
    assert last["holdout_bits_per_byte"] == pytest.approx(last["holdout_loss"] / math.log(2) / bytes_per_token)


def test_a_mixture_resumes_bit_for_bit(run: Path, whole: Path) -> None:
    config = config_of(run, "halves")
    Trainer(config, CPU).run()
    for later in (3, 4):
        (config.checkpoint.directory / f"checkpoint_step_{later}.pt").unlink(missing_ok=True)
    result = Trainer(config, CPU, "latest").run()
    assert result.step == STEPS
    one, other = tensors(whole), tensors(result.checkpoint)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert config_from_dict(load_checkpoint(whole)["config"], "saved").data == config.data


def test_the_length_of_a_run_does_not_change_its_samples(run: Path) -> None:
    short = Trainer(config_of(run, "short"), CPU).loader
    long = Trainer(config_of(run, "long", f"training.total_tokens={9 * TOKENS_PER_STEP}"), CPU).loader
    assert np.array_equal(short.batch(0, 16), long.batch(0, 16))


def test_changed_sources_are_refused(run: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = f"training.total_tokens={(STEPS + 1) * TOKENS_PER_STEP}"
    heavier = config_of(run, "whole", more, with_sources(run, {"weight": 2}, {}))
    with pytest.raises(CheckpointError, match=r"data\.sources\.weight: \[3\.0, 1\.0\] -> \[2\.0, 1\.0\]"):
        Trainer(heavier, CPU, str(whole))
    Trainer(heavier, CPU, str(whole), allow_changed_data=True)
    swapped = with_sources(run, {"path": f"{run.parent}/words"}, {"path": f"{run.parent}/code"})
    with pytest.raises(CheckpointError, match=r"was trained on other tokens than those in code \(.*words/train\)"):
        Trainer(config_of(run, "whole", more, swapped), CPU, str(whole))
    caplog.clear()
    renamed = with_sources(run, {"name": "python"}, {})
    Trainer(config_of(run, "whole", more, renamed), CPU, str(whole))
    assert any("data.sources.name: [code, words] -> [python, words]" in line for line in caplog.messages)


def test_epochs_are_said_and_many_are_warned_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = open_tokens(config_of(run, "epochs"))
    windows = [(part.source.num_tokens("train") - 1) // SEQUENCE_LENGTH for part in tokens.parts]
    budget = 12 * windows[1] * SEQUENCE_LENGTH
    caplog.set_level(logging.INFO)
    caplog.clear()
    even = with_sources(run, {"weight": 1}, {"weight": 1.0})
    Trainer(config_of(run, "epochs", f"training.total_tokens={budget}", even), CPU)
    lines = [line for line in caplog.messages if line.startswith("Source")]
    shares = [line.split(",")[0] for line in lines]
    assert shares == ["Source code: 50.00% of the samples", "Source words: 50.00% of the samples"]
    assert f" {6 * windows[1] / windows[0]:.2f} epochs over" in lines[0]
    assert " 6.00 epochs over\nthe " in lines[1]
    warnings = [line for line in caplog.messages if "teaches little" in line]
    assert len(warnings) == 2
    assert "the source words is read 6.0 times in this run" in warnings[1]


def test_a_source_that_is_never_read_is_warned_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    absurd = with_sources(run, {"weight": 1.0e9}, {"weight": 1.0e-9})
    Trainer(config_of(run, "absurd", absurd), CPU)
    found = [line for line in caplog.messages if "may never be read" in line]
    assert len(found) == 1
    assert "the weight of source words gives it less than one of the samples" in found[0]


def test_eval_measures_every_source(run: Path, whole: Path) -> None:
    output = run.parent / "eval.json"
    result = dsv3("eval", whole, "--device", "cpu", "--tokens", 256, "--output", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    measured = read_metrics(config_of(run, "whole").logging.directory / "metrics.jsonl")[-1]
    assert found["models"]["trained model"]["loss"] == pytest.approx(measured["holdout_loss"], abs=1e-5)
    for kind in ("trained model", "bigram", "unigram"):
        own = [found["by_source"][name]["models"][kind]["loss"] for name in ("code", "words")]
        assert found["models"][kind]["loss"] == pytest.approx(0.75 * own[0] + 0.25 * own[1])
    assert found["by_source"]["words"]["models"]["trained model"]["loss"] == pytest.approx(
        measured["holdout_loss/words"], abs=1e-5
    )
    assert "all, by weight" in result.output

    config = config_of(run, "whole")
    trained = Trainer(config, CPU, str(whole)).loader.batch(0, 4 * STEPS)  # less than an epoch of either source
    for part in open_tokens(config).parts:
        windows = ValidationWindows(part.source, SEQUENCE_LENGTH, 128)
        expected = ngram_losses(lambda: [trained], windows.blocks, part.source.vocab_size)
        models = found["by_source"][part.name]["models"]
        assert models["unigram"]["loss"] == pytest.approx(expected.unigram)
        assert models["bigram"]["loss"] == pytest.approx(expected.bigram)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources=[{name: a, path: x, weight: 0}]", "data.sources.0.weight: found 0: expected greater than 0"),
        (
            "data.sources=[{name: a/b, path: x, weight: 1}]",
            "data.sources.0.name: found a/b: expected a name of letters",
        ),
        ("data.sources=[{name: a, weight: 1}]", "data.sources.0.path: missing"),
        (
            "data.sources=[{name: a, path: x, wieght: 1}]",
            "data.sources.0.wieght: unknown field; did you mean weight?",
        ),
        ("data.sources=[{name: a, path: s3://b/x, weight: 1}]", "expected a local path, not an address"),
        ("data.sources=[a]", "data.sources.0: found a: expected a section, with fields such as"),
        ("data.sources=5", "data.sources: found 5: expected a list"),
        ("data.holdout=0.1", "data: sources and holdout are given: expected holdout = null"),
        (
            "data.sources=[{name: a, path: x, weight: 1}, {name: a, path: y, weight: 1}]",
            "data: sources: two are named 'a'",
        ),
    ],
)
def test_a_wrong_source_is_named(run: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run, ["model.vocab_size=null", override])
    assert expected in str(caught.value)


def test_an_error_in_a_file_names_the_line_of_the_source(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = [
        "  sources:",
        "    - {name: a, path: x, weight: 1}",
        "    - name: b",
        "      path: y",
    ]
    text = run.read_text()
    path.write_text("\n".join(["data:", *lines, "      weight: -1", text[text.index("logging:") :]]))
    with pytest.raises(ConfigError, match=r"run\.yaml:6: data\.sources\.1\.weight: found -1: expected"):
        load_config(path)


def test_a_vocabulary_left_open_follows_the_sources(run: Path) -> None:
    config = load_config(run, ["model.vocab_size=null"])
    assert config.model.vocab_size == -(-open_tokens(config).vocab_size // 128) * 128

"""The quality filter by classifier, perplexity and rules, and the commands that train and apply its models."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from deepseek_v3.data.heuristics import HeuristicFilter
from deepseek_v3.data.quality_filtering.command import quality_app
from deepseek_v3.data.quality_filtering.fasttext import load_fasttext
from deepseek_v3.data.quality_filtering.fasttext_training import TrainingOptions, train_classifier
from deepseek_v3.data.quality_filtering.filter import QualityFilter
from deepseek_v3.data.quality_filtering.ngram_model import write_arpa
from deepseek_v3.data.quality_filtering.ngram_training import PerplexityLimits, train_language_model
from deepseek_v3.data.quality_filtering.perplexity_score import load_language_model
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.documents import batch_of


def prose(number: int, seed: int) -> list[str]:
    """Returns texts of a small grammar."""
    draw = random.Random(seed)
    names, verbs, things = ("the fox", "a child", "our teacher"), ("saw", "found", "lost"), ("a river", "the key")
    return [
        "\n".join(f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}." for _ in range(6))
        for _ in range(number)
    ]


def noise(number: int, seed: int) -> list[str]:
    """Returns the same words and some others in random order."""
    draw = random.Random(seed)
    words = "the fox a child our teacher saw found lost river key . buy now click xx yy zz".split()
    return [" ".join(draw.choice(words) for _ in range(30)) for _ in range(number)]


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with classifier.bin, model.arpa and its limits."""
    folder = tmp_path_factory.mktemp("models")
    options = TrainingOptions(buckets=1000)
    train_classifier(prose(80, 0), noise(80, 0), options).write(folder / "classifier.bin")
    write_arpa(train_language_model(prose(80, 0), 3), folder / "model.arpa")
    PerplexityLimits.of(load_language_model(folder / "model.arpa"), [*prose(60, 1), *noise(40, 1)]).write(
        folder / "model.arpa"
    )
    return folder


def test_the_classifier_filters_by_score(models: Path) -> None:
    texts = [*prose(5, 2), *noise(5, 2)]
    stage = QualityFilter(classifier=str(models / "classifier.bin"))
    result = stage.apply(batch_of(texts))
    assert result.kept["text"].to_pylist() == texts[:5]
    model = load_fasttext(models / "classifier.bin")
    expected = model.probabilities(texts)[:, model.index("good")]
    assert result.kept["quality_score"].type == pa.float32()
    assert result.kept["quality_score"].to_pylist() == expected[:5].tolist()
    assert result.observed["quality_score"] == expected.tolist()
    drop = result.dropped.to_pylist()[0]
    assert (drop["id"], drop["stage"], drop["reason"]) == ("d5", "quality_filtering", "low_quality_score")
    assert orjson.loads(drop["figures"]) == {"found": round(float(expected[5]), 4), "limit": 0.5}
    assert drop["trigger"] == texts[5][:200]


def test_another_label_and_min_score(models: Path) -> None:
    texts = [*prose(5, 2), *noise(5, 2)]
    stage = QualityFilter(classifier=str(models / "classifier.bin"), label="bad", min_score=0.9)
    scores = np.array(stage.apply(batch_of(texts)).observed["quality_score"])
    kept = stage.apply(batch_of(texts)).kept_rows
    assert (kept == (scores >= 0.9)).all()
    with pytest.raises(DataError, match="has no label 'hq'"):
        QualityFilter(classifier=str(models / "classifier.bin"), label="hq").apply(batch_of(texts))


def test_perplexity_assigns_buckets(models: Path) -> None:
    texts = [*prose(30, 3), *noise(20, 3), ""]
    path = models / "model.arpa"
    result = QualityFilter(language_model=str(path)).apply(batch_of(texts))
    perplexities = load_language_model(path).perplexities(texts).astype(np.float32)
    limits = PerplexityLimits.read(path)
    assert limits is not None
    expected = ["head" if p < limits.head else "middle" if p < limits.middle else "tail" for p in perplexities]
    assert {*expected} == {"head", "middle", "tail"}
    assert result.observed["bucket"] == expected
    assert result.observed["perplexity"] == perplexities.tolist()
    assert result.kept["bucket"].to_pylist() == [bucket for bucket in expected if bucket != "tail"]
    assert {*result.dropped["reason"].to_pylist()} == {"perplexity_tail"}
    last = result.dropped.to_pylist()[-1]
    assert (last["id"], orjson.loads(last["figures"])) == ("d50", {"found": None})  # no words, no perplexity
    assert math.isinf(result.observed["perplexity"][-1])


def test_limits_and_kept_buckets_are_options(models: Path, tmp_path: Path) -> None:
    texts = [*prose(10, 3), *noise(10, 3)]
    path = tmp_path / "model.arpa"
    path.write_bytes((models / "model.arpa").read_bytes())
    perplexities = load_language_model(path).perplexities(texts)
    head, middle = np.percentile(perplexities, [20, 50]).tolist()
    stage = QualityFilter(language_model=str(path), head_limit=head, middle_limit=middle, keep=["middle"])
    result = stage.apply(batch_of(texts))
    assert (result.kept_rows == ((perplexities >= head) & (perplexities < middle))).all()
    assert {*result.dropped["reason"].to_pylist()} == {"perplexity_head", "perplexity_tail"}
    with pytest.raises(
        DataError, match=r"model.arpa: has no limits file beside it; set quality_filtering.head_limit"
    ):
        QualityFilter(language_model=str(path)).apply(batch_of(texts))


def test_the_classifier_applies_before_the_language_model(models: Path) -> None:
    texts = [*prose(20, 4), *noise(10, 4)]
    options = {"classifier": str(models / "classifier.bin"), "language_model": str(models / "model.arpa")}
    both = QualityFilter(**options).apply(batch_of(texts))
    each = [QualityFilter(**{name: path}).apply(batch_of(texts)) for name, path in options.items()]
    assert (both.kept_rows == each[0].kept_rows & each[1].kept_rows).all()
    reasons = dict(zip(both.dropped["id"].to_pylist(), both.dropped["reason"].to_pylist(), strict=True))
    assert {reasons[id_] for id_ in each[0].dropped["id"].to_pylist()} == {"low_quality_score"}
    assert {*both.kept.schema.names} >= {"quality_score", "perplexity", "bucket"}


@pytest.mark.parametrize("preset", ["gentle", "web"])
def test_without_a_model_the_rules_of_a_preset_apply(preset: str) -> None:
    texts = ["too short", "word " * 200, *prose(2, 5)]
    options = {} if preset == "gentle" else {"preset": preset}
    result, rules = (
        QualityFilter(**options).apply(batch_of(texts)),
        HeuristicFilter(preset=preset).apply(batch_of(texts)),
    )
    assert result.dropped.num_rows > 0
    for column in ("id", "reason", "figures", "trigger"):
        assert result.dropped[column].to_pylist() == rules.dropped[column].to_pylist()
    assert {*result.dropped["stage"].to_pylist()} == {"quality_filtering"}
    assert (result.kept_rows == rules.kept_rows).all()


def test_the_quality_filter_pickles(models: Path) -> None:
    stage = QualityFilter(classifier=str(models / "classifier.bin"))
    texts = [*prose(2, 6), *noise(2, 6)]
    assert (
        pickle.loads(pickle.dumps(stage)).apply(batch_of(texts)).observed == stage.apply(batch_of(texts)).observed
    )
    assert stage.apply(batch_of([])).kept.num_rows == 0


@pytest.mark.parametrize("option", ["classifier", "language_model"])
def test_missing_models_are_refused(option: str) -> None:
    with pytest.raises(DataError, match=rf"quality_filtering.{option} = none: is not a file; train a model"):
        QualityFilter(**{option: "none"})


@pytest.mark.parametrize("limits", [{"head_limit": 5.0}, {"head_limit": 5.0, "middle_limit": 4.0}])
def test_limits_must_ascend(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected both, the first below the second, or neither"):
        QualityFilter(**limits)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(quality_app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_quality_train_and_score_a_classifier(tmp_path: Path) -> None:
    good, bad = lines(tmp_path / "good.jsonl", prose(150, 7)), lines(tmp_path / "bad.jsonl", noise(150, 7))
    model = str(tmp_path / "model.bin")
    output = run("train", "--good", good, "--bad", bad, "--output", model, "--holdout", "0.2").output
    assert "held out: " in output
    assert "area under the ROC curve 1.000" in output
    scores = run("score", "--model", model, good, bad).stdout.splitlines()
    assert len(scores) == 300
    values = [float(line.split("\t")[0]) for line in scores]
    assert min(values[:150]) > 0.5 > max(values[150:])
    again = str(tmp_path / "again.bin")
    run("train", "--good", good, "--bad", bad, "--output", again, "--holdout", "0.2")
    assert Path(again).read_bytes() == Path(model).read_bytes()


@pytest.mark.parametrize("documents", [1, 2, 8])
def test_a_classifier_of_few_documents_has_metrics(documents: int, tmp_path: Path) -> None:
    good, bad = (
        lines(tmp_path / "good.jsonl", prose(documents, 0)),
        lines(tmp_path / "bad.jsonl", noise(documents, 0)),
    )
    output = run("train", "--good", good, "--bad", bad, "--output", str(tmp_path / "m.bin")).output
    assert "held out: 2 documents, precision" in output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("documents", [1, 2, 8])
def test_few_documents_give_a_language_model_and_a_warning(documents: int, seed: int, tmp_path: Path) -> None:
    text = lines(tmp_path / "text.jsonl", prose(documents, seed))
    output = run("train", "--text", text, "--output", str(tmp_path / "m.arpa")).output
    assert "held-out document" in output
    assert (
        "Percentiles of 1 document are unreliable limits of head, middle and tail: give 20 or more documents"
        in output
    )


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["one"], [], r"1 word in 1 document; expected at least 2, one to train on and one to hold out"),
        ([" ", "\n"], [], r"holds no text"),
        (
            ["one two " * 99],
            ["--holdout", "1e-9"],
            r".*; holdout = 1e-09 leaves less than one word to one of the splits",
        ),
    ],
)
def test_text_too_small_to_hold_out_is_refused(
    texts: list[str], options: list[str], message: str, tmp_path: Path
) -> None:
    text = lines(tmp_path / "text.jsonl", texts)
    with pytest.raises(DataError, match=rf"text.jsonl: {message}"):
        run("train", "--text", text, "--output", str(tmp_path / "m.arpa"), *options)


def test_with_reference_files_no_text_is_held_out(tmp_path: Path) -> None:
    text, reference = lines(tmp_path / "text.jsonl", prose(1, 0)), lines(tmp_path / "web.jsonl", prose(20, 1))
    output = run("train", "--text", text, "--reference", reference, "--output", str(tmp_path / "m.arpa")).output
    assert "1 documents, " in output
    assert "unreliable" not in output


def test_quality_train_and_score_a_language_model(tmp_path: Path) -> None:
    text, reference = lines(tmp_path / "text.jsonl", prose(90, 8)), lines(tmp_path / "web.jsonl", noise(90, 8))
    model = str(tmp_path / "model.arpa")
    assert "held-out documents: 30 % below" in run("train", "--text", text, "--output", model).output
    held_out = PerplexityLimits.read(Path(model))
    output = run("train", "--text", text, "--reference", reference, "--order", "2", "--output", model).output
    by_reference = PerplexityLimits.read(Path(model))
    assert "perplexity of 90 reference documents" in output
    assert held_out is not None
    assert by_reference is not None
    assert by_reference.head > held_out.middle
    scores = run("score", "--model", model, reference).stdout.splitlines()
    values = [float(line.split("\t")[0]) for line in scores]
    assert np.mean(np.array(values) < by_reference.middle) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "options",
    [[], ["--good", "g"], ["--good", "g", "--text", "t"], ["--good", "g", "--bad", "b", "--reference", "r"]],
)
def test_mixed_quality_options_are_refused(options: list[str]) -> None:
    with pytest.raises(DataError, match="expected --good and --bad for a classifier, or --text"):
        run("train", *options, "--output", "m")


def test_an_unwritable_model_path_is_named(tmp_path: Path) -> None:
    text = lines(tmp_path / "text.jsonl", prose(50, 0))
    with pytest.raises(DataError, match=r"text.jsonl/model.arpa: cannot be written"):
        run("train", "--text", text, "--output", f"{text}/model.arpa")


def test_a_holdout_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(DataError, match=r"--holdout 1.5: expected a share"):
        run("train", "--text", "t", "--output", "m", "--holdout", "1.5")


def test_the_commands_clean_as_the_pipeline_does(tmp_path: Path) -> None:
    good, bad = prose(40, 0), lines(tmp_path / "bad.jsonl", noise(40, 0))
    raw = [f"\u001b[1m{text} \r\n" for text in good]
    models = []
    for name, texts in (("clean", good), ("raw", raw)):
        models.append(tmp_path / f"{name}.bin")
        arguments = ["train", "--good", lines(tmp_path / f"{name}.jsonl", texts), "--bad", bad]
        result = CliRunner().invoke(quality_app, [*arguments, "--output", str(models[-1]), "--epochs", "1"])
        assert result.exit_code == 0
    assert models[0].read_bytes() == models[1].read_bytes()
    page = "<!DOCTYPE html><html><body><p>a river</p></body></html>"
    scored = [
        CliRunner().invoke(quality_app, ["score", "--model", str(models[0]), lines(tmp_path / "s.jsonl", [text])])
        for text in ("a river", page)
    ]
    assert scored[0].stdout == scored[1].stdout != ""

"""`dsv3 tokenize`, `dsv3 eval` and `dsv3 quickstart` on a small corpus, and their refusals."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.monitoring import read_metrics
from helpers.runs import dsv3, message_of, run_fields, write_corpus, write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    result = dsv3("train", "--device", "cpu", "--config", write_run(folder, steps=12))
    assert result.exit_code == 0, result.output
    return folder


def _losses_in(output: str) -> dict[str, float]:
    rows = re.findall(r"(trained model|bigram|unigram) +│ +(\d+\.\d+)", output)
    return {name: float(loss) for name, loss in rows}


def test_a_folder_of_text_becomes_shards(tmp_path: Path) -> None:
    command = ["tokenize", "--input", write_corpus(tmp_path / "text"), "--output", tmp_path / "tokens"]
    result = dsv3(*command, "--vocab-size", 300, "--holdout", 0.2, "--fim-rate", 0.5)
    assert result.exit_code == 0, result.output
    shards = TokenShards.open(tmp_path / "tokens")
    assert shards.num_documents("train") + shards.num_documents("holdout") == 40
    again = dsv3(*command, "--vocab-size", 300)
    assert "exists and is left as it is" in message_of(again)


def test_a_tokenizer_can_be_used_again(tmp_path: Path, run_folder: Path) -> None:
    command = ["tokenize", "--input", run_folder / "text", "--output", tmp_path / "tokens", "--holdout", 0.2]
    assert dsv3(*command, "--tokenizer", run_folder / "tokens" / "tokenizer.json").exit_code == 0
    index = TokenShards.open(tmp_path / "tokens").index
    assert index.tokenizer_sha256 == TokenShards.open(run_folder / "tokens").index.tokenizer_sha256


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give one of --input and --corpus"),
        (["--corpus", "wikipedia", "--vocab-size", "300"], "expected python-stdlib"),
        (["--corpus", "python-stdlib"], "expected one of the two"),
        (["--input", "nothing-here", "--vocab-size", "300"], "nothing-here"),
    ],
)
def test_requests_that_cannot_be_meant(tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in message_of(dsv3("tokenize", "--output", tmp_path / "tokens", *words))
    assert not (tmp_path / "tokens").exists()


def test_evaluation_repeats_what_training_measured(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "checkpoint_step_12.pt"
    result = dsv3("eval", "--device", "cpu", "--checkpoint", checkpoint, "--tokens", 256)
    assert result.exit_code == 0, result.output
    measured = [r for r in read_metrics(run_folder / "run" / "metrics.jsonl") if "holdout_loss" in r][-1]
    losses = _losses_in(result.output)
    assert losses["trained model"] == pytest.approx(measured["holdout_loss"], abs=1e-4)
    assert losses["bigram"] < losses["unigram"]
    assert f"{measured['holdout_bits_per_byte']:.4f}" in result.output


def test_evaluation_on_ids_of_another_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", documents=20)
    (text / "more.txt").write_text("a page of other words, so that other pairs are merged\n" * 50, encoding="utf-8")
    words = ["--input", text, "--vocab-size", 300, "--holdout", 0.2, "--output", tmp_path / "tokens"]
    assert dsv3("tokenize", *words).exit_code == 0
    checkpoint = run_folder / "checkpoints" / "checkpoint_step_12.pt"
    message = message_of(dsv3("eval", "--checkpoint", checkpoint, "--data", tmp_path / "tokens"))
    assert "was tokenized by another tokenizer" in message
    assert "dsv3 tokenize --tokenizer" in message


def test_evaluation_on_other_text_by_the_same_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    words = ["--input", write_corpus(tmp_path / "text", 20), "--output", tmp_path / "tokens", "--holdout", 0.2]
    assert dsv3("tokenize", *words, "--tokenizer", run_folder / "tokens").exit_code == 0
    checkpoint = run_folder / "checkpoints" / "checkpoint_step_12.pt"
    result = dsv3("eval", "--device", "cpu", "--checkpoint", checkpoint, "--data", tmp_path / "tokens")
    assert result.exit_code == 0, result.output


def test_evaluation_on_other_tokens_than_the_model_knows(run_folder: Path, tmp_path: Path) -> None:
    words = ["--input", run_folder / "text", "--vocab-size", 320, "--holdout", 0.2, "--output", tmp_path / "tokens"]
    text = run_folder / "text" / "many_words.txt"
    text.write_text(" ".join(f"{a}{b}{a}" for a in "ghijklmnop" for b in "qrstuvwxyz") * 20, encoding="utf-8")
    assert dsv3("tokenize", *words).exit_code == 0
    text.unlink()
    checkpoint = run_folder / "checkpoints" / "checkpoint_step_12.pt"
    message = message_of(dsv3("eval", "--checkpoint", checkpoint, "--data", tmp_path / "tokens"))
    assert "model.vocab_size = 300" in message


def test_evaluation_on_text_by_source(run_folder: Path, tmp_path: Path) -> None:
    records = [{"text": "def a(x): return x + 4\n", "from": "code"}, {"text": "é", "from": "prose"}]
    lines = tmp_path / "records.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    command = ["eval", "--device", "cpu", run_folder / "checkpoints", "--source-field", "from"]
    result = dsv3(*command, "--data", lines, "--output", tmp_path / "results.json")
    assert result.exit_code == 0, result.output
    assert "was trained on sequences of 32" in result.output
    assert result.output.endswith("--prompt The --device cpu\n")
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["bytes"]) for one in written["sources"]] == [("code", 23), ("prose", 2)]
    assert (written["step"], written["context"], written["stride"], written["dtype"]) == (12, 64, 64, "float32")
    saved = load_model(run_folder / "checkpoints", torch.device("cpu"))
    ids = saved.tokenizer.encode(str(records[0]["text"]))
    logits_SV = saved.model(torch.tensor([[saved.tokenizer.end_of_text, *ids[:-1]]]))[0]
    assert written["sources"][0]["loss"] == pytest.approx(cross_entropy(logits_SV, torch.tensor(ids)).item())
    for one in (*written["sources"], written["total"]):
        cells = [f"{one[name]:,}" for name in ("documents", "tokens", "bytes")]
        cells += [f"{one['loss']:.4f}", f"{one['perplexity']:,.2f}", f"{one['bits_per_byte']:.4f}"]
        assert re.search(rf"^{one['name']} +" + " +".join(map(re.escape, cells)) + "$", result.output, re.MULTILINE)
    again = dsv3(*command, "--data", lines, "--output", tmp_path / "results.json")
    assert "exists and is left as it is" in message_of(again)


def test_evaluation_on_held_out_documents_beside_text(run_folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = ["eval", "--device", "cpu", "--checkpoint", run_folder / "checkpoints", "--output", results]
    data = [f"held-out={run_folder / 'tokens'}", f"all={run_folder / 'text'}"]
    assert dsv3(*command, "--context", 32, "--data", data[0], "--data", data[1]).exit_code == 0
    held_out, whole = json.loads(results.read_text(encoding="utf-8"))["sources"]
    assert (whole["documents"], held_out["documents"]) == (40, 8)
    assert whole["bytes"] == sum(path.stat().st_size for path in (run_folder / "text").iterdir())
    assert held_out["loss"] == pytest.approx(whole["loss"], abs=0.05)
    results.unlink()
    assert dsv3(*command, "--data", run_folder / "tokens").exit_code == 0
    assert json.loads(results.read_text(encoding="utf-8"))["models"].keys() == {
        "trained model",
        "bigram",
        "unigram",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "found neither of MODEL and --checkpoint"),
        (["{run}", "--checkpoint", "{run}"], "found both of MODEL and --checkpoint"),
        (["{run}", "--stride", "4"], "are for texts"),
        (["{run}", "--data", "{text}", "--context", "65"], "expected at most the model's context of 64"),
        (["{run}", "--limit", "5"], "are for --tasks; name the tasks"),
        (["{run}", "--data", "{text}", "--tasks", "a"], "tasks have texts of their own"),
        (["{run}", "--data", "a=nothing"], "nothing: does not exist"),
        (["{run}", "--data", "{text}", "--output", "{text}"], "exists and is left as it is"),
        (["{run}", "--data", "{text}", "--output", "{text}/000.py/x.json"], "000.py is no folder; choose another"),
        (
            ["{run}", "--data", "{text}", "--source-field", "from"],
            "000.py: has no string or integer in field 'from'",
        ),
    ],
)
def test_evaluations_that_cannot_be_meant(run_folder: Path, words: list[str], expected: str) -> None:
    places = {"run": run_folder / "checkpoints", "text": run_folder / "text"}
    assert expected in message_of(dsv3("eval", *(word.format(**places) for word in words)))


def test_tasks_without_lm_eval(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = message_of(dsv3("eval", run_folder / "checkpoints", "--tasks", "arc_easy"))
    assert "--tasks needs lm_eval; run `pip install 'deepseek_v3[lm-eval]'`" in message


@pytest.mark.usefixtures("loss_picture")
def test_the_quickstart_goes_the_whole_way_twice(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    write_corpus(tmp_path / "text")
    config.write_text(yaml.safe_dump(run_fields(tmp_path, steps=12)), encoding="utf-8")
    outputs = [dsv3("quickstart", "--config", config, "--runs", tmp_path / "runs") for _ in range(2)]
    for result, name in zip(outputs, ("quickstart", "quickstart-2"), strict=True):
        assert result.exit_code == 0, result.output
        assert (tmp_path / "runs" / name / "loss.png").exists()
        assert "the model writes" in result.output
        assert "dsv3 generate --checkpoint" in result.output
        assert _losses_in(result.output).keys() == {"trained model", "bigram", "unigram"}
    first, second = (
        [r["loss"] for r in read_metrics(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in r]
        for name in ("quickstart", "quickstart-2")
    )
    assert first == second


def _quickstart(tmp_path: Path, steps: int = 8) -> list[object]:
    write_corpus(tmp_path / "text")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_fields(tmp_path, steps)), encoding="utf-8")
    return ["quickstart", "--config", config, "--runs", tmp_path / "runs"]


def _losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def test_an_interrupted_quickstart_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, steps = _quickstart(tmp_path), iter([False, False, True])
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(GracefulStop, "should_stop", lambda _: next(steps))
        stopped = dsv3(*command)
    assert stopped.exit_code == 130, stopped.output
    assert "Stopped after step 3; the same command resumes the run" in stopped.output
    assert (
        f"Next:\n  dsv3 quickstart --config {tmp_path / 'run.yaml'} --runs {tmp_path / 'runs'}\n" in stopped.output
    )
    with monkeypatch.context() as patched:
        patched.setattr("deepseek_v3.quickstart._show_samples", _interrupt)
        assert dsv3(*command).exit_code != 0
    trained = _losses_of(tmp_path / "runs" / "quickstart")
    resumed = dsv3(*command)
    assert resumed.exit_code == 0, resumed.output
    assert "Resuming " in resumed.output
    assert "Step 8/8" not in resumed.output
    assert _losses_of(tmp_path / "runs" / "quickstart") == trained
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]
    whole = dsv3(*command)
    assert _losses_of(tmp_path / "runs" / "quickstart-2") == trained
    assert _losses_in(whole.output) == _losses_in(resumed.output)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_quickstart_of_another_config_starts_anew(tmp_path: Path) -> None:
    command = _quickstart(tmp_path, steps=3)
    for folder in ("quickstart", "quickstart-2"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "config.yaml").write_text("model: {}", encoding="utf-8")
    (tmp_path / "runs" / "quickstart-2" / "notes.txt").write_text("mine", encoding="utf-8")
    assert dsv3(*command).exit_code == 0
    assert (tmp_path / "runs" / "quickstart-3" / "summary.json").exists()


def test_a_quickstart_killed_before_its_first_step_goes_on(tmp_path: Path) -> None:
    command = _quickstart(tmp_path, steps=3)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / ".lock").touch()
    result = dsv3(*command)
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]


def test_the_quickstart_needs_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepseek_v3.quickstart.train_run", lambda config, *_, **__: _refuse(config))
    message = message_of(dsv3("quickstart"))
    assert message == "tokens in data/quickstart, run in runs/quickstart, 512 ids"
    assert not (tmp_path / "runs" / "quickstart").exists()


def _refuse(config: RunConfig) -> None:
    places = f"tokens in {config.data.path}, run in {config.logging.directory}"
    raise DataError(f"{places}, {config.model.vocab_size} ids")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "tiny --set data.corpus=null"),
        (["--sequence-length", 128], "tiny --set data.corpus=null --set training.sequence_length=128"),
        (["--sequence-length", 1024], "1b --set training.sequence_length=1024 --set model.vocab_size=null"),
    ],
)
def test_tokenize_names_a_command_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dsv3("tokenize", "--input", write_corpus(tmp_path / "my text"), "--vocab-size", 300, *options)
    assert result.exit_code == 0, result.output
    assert sorted(result.output.splitlines()[-1].split(" --")) == sorted(
        f"  dsv3 train --config {expected}".split(" --")
    )
    size, *words = shlex.split(expected)
    assert load_config(size, words[1::2]).model.vocab_size == 384


def test_tokens_elsewhere_get_folders_of_their_own(tmp_path: Path) -> None:
    output = tmp_path / "my tokens"
    result = dsv3("tokenize", "--input", write_corpus(tmp_path / "text"), "--vocab-size", 300, "--output", output)
    words = shlex.split(result.output.splitlines()[-1])
    fast = ["training.total_tokens=512", "training.global_batch_size=2", "parallel.micro_batch_size=2"]
    fast += [f"{name}.directory={tmp_path / name}" for name in ("checkpoint", "logging")]
    assert f"data.path={output}" in words
    assert "checkpoint.directory=checkpoints/my tokens" in words
    trained = dsv3(*words[1:], "--device", "cpu", *(word for change in fast for word in ("--set", change)))
    assert trained.exit_code == 0, trained.output

"""`dsv3 train`: the files that it writes, exact resume, signals, and every kind of bad input."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.training.disk_space import checkpoint_bytes
from deepseek_v3.utils import monitoring
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, load_checkpoint
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter
from deepseek_v3.utils.monitoring import read_metrics
from helpers import ROOT, fork_server
from helpers.jobs import HANGS, write_output_to
from helpers.runs import TOKENS_PER_STEP, dsv3, message_of, run_fields, write_corpus, write_run

STEPS = 6
STEP_LINE = re.compile(r"^\[Trainer\] Step (\d+)/6 \| Loss: \d+\.\d{4} \| LR: \d\.\d\de-\d\d \| Tokens: 0\.\d\dK$")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    result = dsv3("train", "--device", "cpu", "--config", write_run(folder, STEPS))
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output, encoding="utf-8")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run whose config names the copy's paths."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_fields(tmp_path, STEPS)), encoding="utf-8")
    return tmp_path


def _differences(left: object, right: object, at: str = "") -> list[str]:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if torch.equal(left, right) and left.dtype == right.dtype else [at]
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [found for key in left for found in _differences(left[key], right[key], f"{at}.{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for number, pair in pairs for found in _differences(*pair, f"{at}[{number}]")]
    return [] if left == right else [at]


def _training_state(path: Path) -> dict[str, object]:
    return {name: value for name, value in load_checkpoint(path).items() if name != "config"}


def test_a_run_logs_its_steps_and_leaves_all_its_files(finished: Path) -> None:
    lines = (finished / "output.txt").read_text(encoding="utf-8").splitlines()
    numbers = [int(match[1]) for line in lines if (match := STEP_LINE.match(line))]
    assert numbers == list(range(1, STEPS + 1))
    assert load_config(finished / "run" / "config.yaml") == load_config(finished / "run.yaml")
    assert (finished / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == [f"checkpoint_step_{step}.pt" for step in (2, 4, 6)]


def test_the_step_lines_of_a_small_run_fit_a_terminal(finished: Path) -> None:
    text = (finished / "output.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^\[Trainer\] Step .*(?:\n {10}.*)*", text, re.MULTILINE)
    assert len(blocks) == STEPS
    for block in blocks:
        assert max(map(len, block.splitlines())) <= 80
        assert re.search(r"\| Left: \d+:\d\d", block)
        assert re.search(r"Grad norm: \d+\.\d\d", block)


def test_metrics_hold_every_figure_for_every_step(finished: Path) -> None:
    records = read_metrics(finished / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in steps] == [TOKENS_PER_STEP * n for n in range(1, STEPS + 1)]
    per_layer = {"entropy", "utilisation", "max_violation", "bias_min", "bias_max"}
    for record in steps:
        assert {"mtp_loss", "balance_loss", "learning_rate", "gradient_norm"} <= record.keys()
        assert {"tokens_per_second", "tokens_per_parameter", "memory_bytes"} <= record.keys()
        for name in per_layer:
            assert len(record[f"experts/{name}"]) == 2  # one mixture layer and the prediction layer
        assert record["cache/latent_bytes_per_token"] == 2 * (8 + 4) * 4
        assert record["cache/multi_head_bytes_per_token"] == 2 * 2 * (8 + 4 + 8) * 4
    assert [record["step"] for record in records if "holdout_loss" in record] == [3, 6]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_is_as_large_as_expected_in_both_forms(finished: Path, tmp_path: Path) -> None:
    file = finished / "checkpoints" / "checkpoint_step_6.pt"
    with ShardedWriter(CheckpointDirectory(tmp_path, keep=1), None) as writer:
        folder = writer.save(6, load_checkpoint(file)).path
    expected = checkpoint_bytes(load_config(finished / "run.yaml"))
    assert file.stat().st_size <= expected <= 1.25 * file.stat().st_size
    written = sum(part.stat().st_size for part in folder.iterdir())
    assert written <= expected <= 1.25 * written


def test_the_bias_moves_by_gamma_once_a_step(finished: Path) -> None:
    """After two steps a bias has moved by 0, 1 or 2 times 0.001."""
    state = load_checkpoint(finished / "checkpoints" / "checkpoint_step_2.pt")
    biases = [value for name, value in state["model"].items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for bias in biases:
        moves = (bias / 1e-3).round()
        torch.testing.assert_close(bias, moves * 1e-3)
        assert moves.abs().max() <= 2
    assert any(bias.any() for bias in biases)


@pytest.mark.parametrize("resume", ["latest", "checkpoints/checkpoint_step_2.pt"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder: Path, finished: Path, resume: str) -> None:
    for step in (4, 6):
        (folder / "checkpoints" / f"checkpoint_step_{step}.pt").unlink()
    where = resume if resume == "latest" else folder / resume
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", where)
    assert result.exit_code == 0, result.output
    for step in (4, 6):
        name = f"checkpoints/checkpoint_step_{step}.pt"
        assert _differences(_training_state(folder / name), _training_state(finished / name)) == []
    timed = ("tokens_per_second", "memory_bytes", "time")
    timeless = [
        [{k: v for k, v in record.items() if k not in timed} for record in records]
        for records in (read_metrics(path / "run" / "metrics.jsonl") for path in (folder, finished))
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("budget", [700, 768, 769])
def test_a_run_ends_with_the_first_step_that_reaches_its_budget(folder: Path, budget: int) -> None:
    shutil.rmtree(folder / "checkpoints")
    setting = f"training.total_tokens={budget}"
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--set", setting)
    assert result.exit_code == 0, result.output
    steps = -(-budget // TOKENS_PER_STEP)
    config = load_config(folder / "run.yaml", [setting])
    ratio = steps * TOKENS_PER_STEP / count_active_parameters(config.model)
    last = read_metrics(folder / "run" / "metrics.jsonl")[-2]
    assert (last["step"], last["tokens"]) == (steps, steps * TOKENS_PER_STEP)
    assert last["tokens_per_parameter"] == pytest.approx(ratio)
    assert f"Tokens/param: {ratio:.2f}" in result.output
    end = f"Finished: {steps * TOKENS_PER_STEP:,} tokens in {steps} steps, {ratio:.2f} per active parameter"
    assert f"{end};\n          the budget was {budget:,}" in result.output


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["training.seed=1"], "training.seed: 0 -> 1"),
        (["training.global_batch_size=8"], "training.global_batch_size: 4 -> 8"),
        (["training.sequence_length=16"], "training.sequence_length: 32 -> 16"),
        (["training.batch_ramp.initial=2"], "training.batch_ramp.initial: null -> 2"),
        (["data.mask_documents=true"], "data.mask_documents: false -> true"),
    ],
)
def test_a_resumed_run_takes_the_samples_it_would_have(folder: Path, changes: list[str], problem: str) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_4.pt"
    words = [word for change in changes for word in ("--set", change)]
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint, *words)
    assert problem in message_of(result)
    assert "--allow-changed-data" in message_of(result)


@pytest.mark.parametrize("batch", [2, 8])
def test_changed_data_can_be_allowed(folder: Path, caplog: pytest.LogCaptureFixture, batch: int) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_4.pt"
    changes = [f"training.global_batch_size={batch}", "training.seed=3", "training.total_tokens=1280"]
    words = [word for change in changes for word in ("--set", change)]
    command = ["train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint]
    result = dsv3(*command, "--allow-changed-data", *words)
    assert result.exit_code == 0, result.output
    assert (
        f"training.seed: 0 -> 3; training.total_tokens: 768 -> 1280; training.global_batch_size: 4 -> {batch}"
        in (caplog.text)
    )
    assert read_metrics(folder / "run" / "metrics.jsonl")[-2]["step"] == -(-1280 // (32 * batch))


def test_changed_data_leave_some_steps_to_take(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_4.pt"
    words = ["--allow-changed-data", "--set", "training.global_batch_size=16"]
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint, *words)
    assert "ends with step 2, before the checkpoint's step 4; raise training.total_tokens" in message_of(result)


def test_a_smaller_budget_than_was_trained_is_refused(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_4.pt"
    words = ["--set", "training.total_tokens=256"]
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint, *words)
    assert "had trained on 512 tokens, and this run's budget of 256 ends with step 2" in message_of(result)


def test_a_changed_recipe_is_named_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_4.pt"
    changes = ["training.optimizer.moments=float32", "parallel.micro_batch_size=4", "checkpoint.keep=2"]
    words = [word for change in changes for word in ("--set", change)]
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint, *words)
    assert result.exit_code == 0, result.output
    changes = [line for line in caplog.messages if "differs from the checkpoint's" in line]
    assert changes == [
        "the config differs from the checkpoint's: training.optimizer.moments: bfloat16 -> float32; "
        "parallel.micro_batch_size: 2 -> 4"
    ]


def test_a_resumed_run_may_be_given_a_larger_budget(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint_step_6.pt"
    longer = ["--set", f"training.total_tokens={8 * TOKENS_PER_STEP}"]
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", checkpoint, *longer)
    assert result.exit_code == 0, result.output
    assert read_metrics(folder / "run" / "metrics.jsonl")[-2]["tokens"] == 8 * TOKENS_PER_STEP


def test_resuming_an_older_checkpoint_warns_of_the_newer_ones(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = folder / "checkpoints" / "checkpoint_step_4.pt"
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", earlier)
    assert result.exit_code == 0, result.output
    assert "also holds later checkpoints, up to step 6" in caplog.text


def test_two_runs_of_one_config_are_equal(folder: Path, finished: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    assert dsv3("train", "--device", "cpu", "--config", folder / "run.yaml").exit_code == 0
    name = "checkpoints/checkpoint_step_6.pt"
    assert _differences(_training_state(folder / name), _training_state(finished / name)) == []
    assert (folder / "run" / "metrics.1.jsonl").exists()


def test_accumulation_gives_the_same_step_as_one_large_batch(folder: Path, finished: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    command = ["train", "--device", "cpu", "--config", folder / "run.yaml", "--set", "parallel.micro_batch_size=4"]
    assert dsv3(*command, "--set", "parallel.recomputation=full").exit_code == 0
    name = "checkpoints/checkpoint_step_2.pt"
    whole, parts = (load_checkpoint(path / name)["model"] for path in (folder, finished))
    for key, value in whole.items():
        if key.endswith("e_score_correction_bias"):
            assert torch.equal(value, parts[key]), key  # from integer counts, so equal to the bit
        else:
            torch.testing.assert_close(value, parts[key], rtol=1e-2, atol=1e-3)


def test_a_finished_run_resumed_has_nothing_left_to_do(folder: Path) -> None:
    before = (folder / "checkpoints" / "checkpoint_step_6.pt").read_bytes()
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", "latest")
    assert result.exit_code == 0, result.output
    assert (folder / "checkpoints" / "checkpoint_step_6.pt").read_bytes() == before


def test_a_finished_run_resumes_without_its_logs(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", "latest")
    assert result.exit_code == 0, result.output
    assert "loss.png: not drawn" in result.output
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "config.yaml",
        "events.jsonl",
        "metrics.jsonl",
    ]


@pytest.mark.usefixtures("loss_picture")
def test_logs_that_cannot_be_written_end_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "run")
    (folder / "run" / "loss.png").mkdir(parents=True)
    opened = monitoring._open_metrics

    def on_a_full_disk(path: Path, resume_step: int | None) -> FileIO:
        opened(path, resume_step).close()
        return FileIO("/dev/full", "ab")

    monkeypatch.setattr(monitoring, "_open_metrics", on_a_full_disk)
    command = ["train", "--device", "cpu", "--config", folder / "run.yaml"]
    result = dsv3(*command, "--set", f"training.total_tokens={2 * TOKENS_PER_STEP}")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(folder / "checkpoints" / "checkpoint_step_2.pt")["step"] == 2
    assert caplog.text.count("metrics.jsonl: cannot be written: No space left on device") == 1
    monkeypatch.undo()
    caplog.clear()
    result = dsv3(*command, "--resume", "latest")
    assert result.exit_code == 0, result.output
    assert "loss.png: cannot be drawn: [Errno 17] is not a regular file" in caplog.text


def test_documents_can_be_masked(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--set", "data.mask_documents=true")
    assert result.exit_code == 0, result.output


def run_script(config: Path, output: Path) -> None:
    """Runs `src/training/train.py` in this process, which has been forked."""
    write_output_to(output)
    sys.argv = ["train.py", "--config", str(config)]
    runpy.run_path(str(ROOT / "src/training/train.py"), run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    config, printed = write_run(tmp_path, steps=100_000), tmp_path / "output.txt"
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = fork_server.CONTEXT.Process(target=run_script, args=(config, printed), daemon=True)
    process.start()
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    with suppress(ProcessLookupError):  # it has failed
        os.kill(process.pid, number)
    process.join(HANGS)
    output = printed.read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    newest = max(int(path.stem.split("_")[-1]) for path in (tmp_path / "checkpoints").iterdir())
    assert f"Stopped after step {newest}" in output
    assert f"dsv3 train --config {config} --resume latest" in output
    assert load_checkpoint(tmp_path / "checkpoints" / f"checkpoint_step_{newest}.pt")["step"] == newest


class TestBadInput:
    """Each ends in one clear line and leaves the files as they are."""

    def test_a_fresh_run_among_the_checkpoints_of_another(self, folder: Path) -> None:
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml"))
        assert "already holds checkpoints up to step 6" in message
        assert "--resume latest" in message

    def test_resuming_another_model(self, folder: Path) -> None:
        words = ["--set", "model.num_hidden_layers=3", "--resume", "latest"]
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", *words))
        assert "is of another model: model.num_hidden_layers: 2 -> 3" in message

    @pytest.mark.parametrize("form", ["file", "folder"])
    def test_a_checkpoint_that_lacks_entries_tells_all_at_once(self, folder: Path, form: str) -> None:
        state = load_checkpoint(folder / "checkpoints" / "checkpoint_step_6.pt")
        del state["tokens"]
        state["more"] = 1
        path = self._saved(folder, state, form)
        resume = ["train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", path]
        for words in (resume, ["generate", "--checkpoint", path, "--prompt", "a"], ["eval", "--checkpoint", path]):
            message = message_of(dsv3(*words))
            assert message.startswith(f"{path}: ")
            assert "tokens: Field required" in message
            assert "more: Extra inputs are not permitted" in message

        state = load_checkpoint(folder / "checkpoints" / "checkpoint_step_6.pt")
        name, other = "model.norm.weight", "lm_head.weight"
        del state["model"][name], state["optimizer"]["exp_avg"][other]
        state["model"]["more"] = torch.zeros(2)
        state["model"][other] = state["model"][other][:1].clone()
        path = self._saved(folder, state, form)
        message = message_of(dsv3(*resume))
        assert f"has no tensor 'model.{name}'" in message
        assert f"has no tensor 'optimizer.exp_avg.{other}'" in message
        assert f"'model.{other}' is torch.float32 [1, 32] there, torch.float32 [300, 32] here" in message
        assert "has the tensor 'model.more', which has no place here" in message
        for words in (["generate", "--checkpoint", path, "--prompt", "a"], ["eval", "--checkpoint", path]):
            message = message_of(dsv3(*words))
            assert f"has no tensor 'model.{name}'" in message
            assert "has the tensor 'model.more'" in message
            assert "exp_avg" not in message

    @staticmethod
    def _saved(folder: Path, state: dict[str, Any], form: str) -> Path:
        checkpoints = CheckpointDirectory(folder / "lacking", keep=9)
        if form == "file":
            return checkpoints.save(6, state)
        with ShardedWriter(checkpoints, None) as writer:
            return writer.save(6, state).path

    def test_a_newest_checkpoint_that_lacks_entries_is_passed_over(self, folder: Path) -> None:
        state = load_checkpoint(folder / "checkpoints" / "checkpoint_step_6.pt")
        del state["model"]["lm_head.weight"]
        CheckpointDirectory(folder / "checkpoints", keep=99).save(7, state)
        result = dsv3("generate", "--checkpoint", folder / "checkpoints", "--prompt", "a", "--max-new-tokens", 1)
        assert result.exit_code == 0, result.output
        assert "skipped" in result.output
        assert "has no tensor 'model.lm_head.weight'" in result.output

    def test_resuming_on_another_corpus(self, folder: Path, tmp_path: Path) -> None:
        tokenizer = (folder / "tokens").rename(tmp_path / "tokens before")
        write_corpus(folder / "text", documents=30)
        words = ["--input", folder / "text", "--output", folder / "tokens", "--holdout", 0.4]
        assert dsv3("tokenize", *words, "--tokenizer", tokenizer).exit_code == 0
        command = ["train", "--device", "cpu", "--config", folder / "run.yaml"]
        command += ["--resume", folder / "checkpoints" / "checkpoint_step_4.pt"]
        message = message_of(dsv3(*command))
        assert "trained on other tokens" in message
        assert "--allow-changed-data" in message
        assert dsv3(*command, "--allow-changed-data").exit_code == 0

    def test_resuming_on_ids_of_another_tokenizer(self, folder: Path) -> None:
        shutil.rmtree(folder / "tokens")
        words = ["--set", "data.corpus.vocab_size=262", "--resume", "latest", "--allow-changed-data"]
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", *words))
        assert "was trained on the ids of another tokenizer" in message

    def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        newest = folder / "checkpoints" / "checkpoint_step_6.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
        result = dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", "latest")
        assert result.exit_code == 0, result.output
        assert "checkpoint_step_6.pt" in caplog.text
        assert "checkpoint_step_4.pt after step 4" in caplog.text

    def test_a_damaged_checkpoint_asked_for_by_name(self, folder: Path) -> None:
        path = folder / "checkpoints" / "checkpoint_step_4.pt"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", path))
        assert "checkpoint_step_4.pt" in message
        assert "damaged" in message

    def test_an_altered_token_shard(self, folder: Path) -> None:
        path = folder / "tokens" / "train" / "00000.bin"
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        message = message_of(
            dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", "--resume", "latest")
        )
        assert "00000.bin" in message

    def test_a_tokenizer_larger_than_the_vocabulary(self, folder: Path) -> None:
        fields = run_fields(folder, STEPS)
        fields["model"]["vocab_size"] = 262
        del fields["data"]["corpus"]
        (folder / "run.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        shutil.rmtree(folder / "checkpoints")
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml"))
        assert "model.vocab_size = 262" in message
        assert not (folder / "checkpoints").exists()

    @pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
    def test_logs_that_cannot_be_written_at_the_start(self, folder: Path, name: str) -> None:
        (folder / "run" / name).unlink()
        (folder / "run" / name / "in_the_way").mkdir(parents=True)
        before = sorted(path.name for path in (folder / "checkpoints").iterdir())
        command = ["train", "--device", "cpu", "--config", folder / "run.yaml"]
        message = message_of(dsv3(*command, "--resume", folder / "checkpoints" / "checkpoint_step_4.pt"))
        assert str(folder / "run") in message
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before

    def test_missing_token_shards(self, folder: Path) -> None:
        fields = run_fields(folder, STEPS)
        del fields["data"]["corpus"]
        (folder / "run.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        shutil.rmtree(folder / "tokens")
        shutil.rmtree(folder / "checkpoints")
        assert "dsv3 tokenize" in message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml"))

    def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(self, folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints")
        words = ["--set", "training.optimizer.learning_rate=1e30", "--set", "training.schedule.warmup_steps=0"]
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", *words))
        assert "learning_rate" in message
        for path in (folder / "checkpoints").glob("*.pt"):
            assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values())

    def test_compiling_what_cannot_be_compiled(self, folder: Path) -> None:
        shutil.rmtree(folder / "checkpoints")
        words = ["--set", "parallel.compile=true"]
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml", *words))
        assert "parallel.compile = true" in message

    def test_several_processes(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        message = message_of(dsv3("train", "--device", "cpu", "--config", folder / "run.yaml"))
        assert "the environment lacks LOCAL_RANK; start it with torchrun, deepspeed or srun" in message

    def test_the_launcher_prints_one_line_and_fails(self, tmp_path: Path) -> None:
        command = [sys.executable, str(ROOT / "src/training/train.py"), "--config", str(tmp_path / "none.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
        assert done.returncode == 1
        assert done.stderr.strip() == f"error: {tmp_path / 'none.yaml'}: cannot be read: No such file or directory"


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(dsv3("config", "schema").output)
    assert set(schema["properties"]) == {"model", "training", "parallel", "data", "checkpoint", "logging"}


def test_a_shown_config_loads_back_to_itself(tmp_path: Path) -> None:
    shown = dsv3("config", "show", ROOT / "configs/deepseek_v3_tiny.yaml", "--set", "training.seed=7").output
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    assert load_config(tmp_path / "shown.yaml").training.seed == 7

"""`dsv3 bench train`: figures with their floors, checks before speed, and peers that may fail."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import Result

from deepseek_v3.benchmark import command, train_benchmark
from deepseek_v3.benchmark.own_training import TrainingFigures, train_own
from deepseek_v3.benchmark.processes import run_apart
from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.ops.grouped_gemm import GROUPED_GEMM, reference_grouped_linear
from deepseek_v3.ops.operation import Backend, Target
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.training import preflight
from deepseek_v3.utils.errors import BenchmarkError, PlanError
from deepseek_v3.utils.text import format_value
from helpers.runs import TOKENS_PER_STEP, dsv3, message_of, run_fields, write_corpus

STEPS = 10


def in_this_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of `run_apart`, without the seconds in which a process starts."""
    return function(*arguments)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run's YAML file, at the range of initial weights that the report has."""
    folder = tmp_path_factory.mktemp("shape")
    write_corpus(folder / "text")
    fields = run_fields(folder)
    fields["model"]["initializer_range"] = 0.006
    path = folder / "shape.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_benchmark, "run_apart", in_this_process)


def bench(shape: Path, *words: object) -> Result:
    return dsv3("bench", "train", "--shape", shape, "--steps", STEPS, "--device", "cpu", *words)


def peer_that_learns(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    first = math.log(config.model.vocab_size)
    return TrainingFigures((1000.0, 3000.0, 2000.0), 2.0**30, 1.5, {1: first, steps: first - 1}, {}, "as told")


def peer_that_fails(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    raise BenchmarkError("it is not installed")


def peer_that_diverges(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    return TrainingFigures((9e9,), 0.0, 1.0, {1: 5.7, steps: None}, {})


def test_figures_follow_from_the_run(shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"learns": peer_that_learns, "fails": peer_that_fails, "diverges": peer_that_diverges}
    monkeypatch.setattr(command, "PEERS", peers)
    output = tmp_path / "found.json"
    result = bench(shape, "--peers", "learns,fails", "--peers", "diverges", "--output", output, "--commit", "abc")
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert (found["command"], found["commit"], found["uncommitted"]) == ("bench train", "abc", False)
    assert found["tokens_per_step"] == TOKENS_PER_STEP
    assert found["versions"]["torch"] == version("torch")
    assert found["ceilings"]["fp8_tflops"] is None

    ours, learns, fails, diverges = found["systems"]
    config = RunConfig.model_validate(yaml.safe_load(shape.read_text(encoding="utf-8")))
    flops = training_flops_per_token(config.model, config.training.sequence_length)
    assert found["flops_per_token"] == flops
    assert ours["system"] == "ours, bf16"
    assert all(check["passed"] for check in ours["checks"])
    assert ours["tflops"] == pytest.approx(ours["tokens_per_second"] * flops / 1e12)
    assert ours["step_seconds"] == pytest.approx(TOKENS_PER_STEP / ours["tokens_per_second"])
    assert ours["share_of_floor"] == pytest.approx(ours["floor"]["seconds"] / ours["step_seconds"])
    assert list(ours["losses"]) == ["1", "5", "10"]
    assert (learns["tokens_per_second"], learns["memory_bytes"], learns["notes"]) == (2000, 2**30, "as told")
    assert learns["tokens_per_second_range"] == [1000, 3000]
    assert fails["failed"] == "it is not installed"
    assert "not finite" in diverges["failed"]
    assert "tokens_per_second" not in {*fails, *diverges}

    lines = result.output.splitlines()
    (row,) = [line for line in lines if line.startswith("tokens/s")]
    assert "2,000 / " in row
    assert row.count("–") == 2
    assert any("figures of a CPU" in line for line in lines)
    assert "fails, bf16: no figures: it is not installed" in lines
    assert "9,000,000,000" not in result.output
    assert "dsv3 bench ops" in result.output


def test_what_is_measured_outlives_a_stopped_run(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "PEERS", {"learns": peer_that_learns})
    monkeypatch.setattr(train_benchmark, "check_narrow_model", lambda *_: [])
    monkeypatch.setattr(train_benchmark, "check_peer", stop)
    output = tmp_path / "found.json"
    assert bench(shape, "--peers", "learns", "--output", output).exit_code != 0
    assert [each["system"] for each in json.loads(output.read_text(encoding="utf-8"))["systems"]] == ["ours, bf16"]


def test_no_speed_without_a_passed_check(shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that mixes up the experts, in the measured precision alone."""

    def mixed_up(x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        return reference_grouped_linear(x_XI, weight_EOI.flip(0), ends_E)

    def obstacle(target: Target) -> str | None:
        return None if target.dtype == torch.bfloat16 else "needs bfloat16"

    faulty = Backend("faulty", lambda: mixed_up, obstacle)
    monkeypatch.setattr(GROUPED_GEMM, "backends", {"faulty": faulty, **GROUPED_GEMM.backends})
    output = tmp_path / "found.json"
    result = bench(shape, "--output", output)
    assert result.exit_code == 1
    message = message_of(result)
    assert message.startswith("no speed is shown for ours, bf16: its check failed: narrow model beside float32")
    assert "cosine of the gradients" in message
    (ours,) = json.loads(output.read_text(encoding="utf-8"))["systems"]
    assert "tokens_per_second" not in ours
    assert not all(check["passed"] for check in ours["checks"])
    (row,) = [line for line in result.output.splitlines() if line.startswith("tokens/s")]
    assert row.split() == ["tokens/s", "–"]


def test_a_run_at_the_wrong_loss_shows_no_speed(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured run is compared with random weights and with eager bfloat16 on the same tokens."""
    monkeypatch.setattr(train_benchmark, "check_narrow_model", lambda *_: [])
    monkeypatch.setattr(train_benchmark, "first_loss", lambda *_: math.log(300))
    run = TrainingFigures((1e6,), 0.0, 1.0, {1: math.log(300) + 0.5, 10: 1.0}, {1: 1.0, 10: 1.0})
    monkeypatch.setattr(train_benchmark, "train_own", lambda *_: run)
    message = message_of(bench(shape))
    assert "first loss, distance from that of random weights: 0.49" in message
    assert "first loss, distance from eager bfloat16: 0.5, expected at most 0.02" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "2b"], "--shape 2b: expected 1b or v3slice, or a run's YAML file"),
        (["--precision", "bf16,int8"], "--precision int8: expected bf16 or fp8"),
        (["--peers", "megatron"], "--peers megatron: expected torchtitan or transformers"),
        (["--set", "parallel.data_shard=2"], "expected a layout of one device"),
        (["--set", "model.hiden_size=4"], "hiden_size"),
        (["--set", "training.global_batch_size=3"], "training.global_batch_size = 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(shape: Path, words: list[str], message: str) -> None:
    result = bench(shape, *words)
    assert result.exit_code == 1
    assert message in message_of(result)


def test_too_few_steps_are_refused(shape: Path) -> None:
    result = dsv3("bench", "train", "--shape", shape, "--steps", 9)
    assert result.exit_code == 2
    assert "at least" in result.output or "from 10" in result.output


def test_a_process_returns_a_result_or_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_apart(math.factorial, 5) == 120
    assert run_apart(os.getpid) != os.getpid()
    with pytest.raises(BenchmarkError, match=r"^ValueError: invalid literal for int"):
        run_apart(int, "five")
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(BenchmarkError, match="was killed"):
        run_apart(os._exit, 3)


def test_transformers_trains_the_same_shape(shape: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from deepseek_v3.benchmark.peers.peer_systems import train_transformers
    from deepseek_v3.benchmark.shape_files import run_config

    config = run_config(str(shape), tmp_path, STEPS, None, "bf16", [])
    figures = train_transformers(config, STEPS, "cpu", time.time())
    assert len(figures.rates) == 1
    assert list(figures.losses) == [1, 5, 10]
    assert figures.losses[1] == pytest.approx(math.log(300), abs=0.2)
    assert figures.losses[10] < figures.losses[1]


def test_a_peer_that_cannot_run_here_is_named(shape: Path) -> None:
    result = bench(shape, "--peers", "torchtitan")
    assert result.exit_code == 0, result.output
    assert "torchtitan, bf16: no figures: torchtitan trains on GPUs only" in result.output


@pytest.mark.parametrize("command", ["train", "ops"])
def test_a_file_that_cannot_be_written_is_refused_first(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output, reason in ((tmp_path, "is no regular file"), (tmp_path / "file" / "x.json", "is no folder")):
        result = dsv3("bench", command, "--device", "cpu", "--output", output)
        assert message_of(result).startswith(f"--output {output}: ")
        assert reason in message_of(result)
        assert "Measuring" not in result.output


def test_the_precision_of_a_run_is_the_option_s(shape: Path) -> None:
    result = bench(shape, "--precision", "bf16", "--set", "parallel.precision=fp8")
    expected = "--set parallel.precision=fp8: a benchmark takes the precisions of its runs from --precision"
    assert message_of(result) == expected


@pytest.mark.parametrize("given", ["bf16,,", ""])
def test_an_empty_name_is_shown_as_it_was_given(shape: Path, given: str) -> None:
    assert (
        message_of(bench(shape, "--precision", given)) == f"--precision {format_value(given)}: expected bf16 or fp8"
    )


def test_a_run_beyond_the_memory_is_not_begun(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "usable_memory", lambda: 2**20)
    with pytest.raises(PlanError, match=r"^this run needs .* GiB on CPU, which has 0\.0 GiB free"):
        train_own(load_config(shape), STEPS, "cpu", time.time())

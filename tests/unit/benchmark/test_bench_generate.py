"""`dsv3 bench generate`: each log-probability is compared with that of training; a wrong system has no speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.benchmark import generate_benchmark
from deepseek_v3.benchmark.ceilings import Ceilings
from deepseek_v3.benchmark.generate_benchmark import (
    GenerationBenchmark,
    GenerationMeasurement,
    generation_floor,
    measure_generation,
)
from deepseek_v3.benchmark.own_generation import (
    GenerationFigures,
    GenerationTask,
    build_model,
    generate_own,
    trained_logprobs,
    write_weights,
)
from deepseek_v3.benchmark.peers import transformers_generation
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.utils.errors import BenchmarkError, ConfigError
from helpers.models import small_config
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")
MODEL = small_config(num_nextn_predict_layers=0, vocab_size=300, max_position_embeddings=64)
TASK = GenerationTask(MODEL, torch.float32, batch=2, prompt=5, new=4, device="cpu")
CEILINGS = Ceilings(bf16_tflops=100.0, fp8_tflops=None, copy_gb_per_s=1000.0)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(generate_benchmark, "run_apart", run_here)
    monkeypatch.setattr(generate_benchmark, "measure_ceilings", lambda _: CEILINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_engine_continues_every_prompt_to_the_asked_length(dtype: torch.dtype) -> None:
    task = replace(TASK, dtype=dtype)
    figures = generate_own(task)
    assert len(figures.tokens) == len(figures.logprobs) == TASK.new
    assert 0 not in figures.tokens  # the end of a text is never the most probable token
    allowed = generate_benchmark._MOST_DIFFERENCE[dtype]
    assert figures.logprobs == pytest.approx(trained_logprobs(task, figures.tokens), abs=allowed)
    assert figures.first_seconds > 0
    assert figures.seconds > 0


def test_transformers_has_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_weights(TASK, tmp_path / "weights")
    tokens = (7, 8, 9)
    peer = transformers_generation.generate(replace(TASK, new=3), tmp_path / "weights", tokens)
    assert peer.logprobs == pytest.approx(trained_logprobs(TASK, tokens), abs=1e-4)
    assert peer.notes.endswith("dynamic cache")


def test_a_system_that_is_wrong_has_no_speed() -> None:
    def shifted(task: GenerationTask, folder: Path, tokens: tuple[int, ...]) -> GenerationFigures:
        logprobs = [each + 0.01 for each in trained_logprobs(task, tokens)]
        return GenerationFigures(1.0, 0.5, 1, tokens, tuple(logprobs))

    def broken(*_: Any) -> GenerationFigures:
        raise BenchmarkError("it has no cache")

    seen: list[int] = []
    result = measure_generation(
        "tiny",
        [TASK],
        {"shifted": shifted, "broken": broken},
        CPU,
        keep=lambda each: seen.append(len(each.measurements)),
    )
    ours, wrong, failed = result.measurements
    assert seen == [1, 2, 3]
    assert not result.problems
    assert ours.tokens_per_second
    assert ours.step_seconds
    assert ours.difference is not None
    assert wrong.figures is None
    assert wrong.difference == pytest.approx(0.01, abs=1e-4)
    assert (wrong.failed or "").startswith("a log-probability is 0.01 nats from that of training's forward pass")
    assert failed.failed == "it has no cache"
    text = "\n".join([*result.table(), *result.explanations()])
    assert "broken, batch 2: no figures: it has no cache" in text
    found = result.as_json()
    assert found["measurements"][1]["tokens_per_second"] is None
    assert found["measurements"][0]["seconds"]


def test_an_engine_that_disagrees_with_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(task: GenerationTask, tokens: Any) -> list[float]:
        return [each - 1 for each in trained_logprobs(task, tokens)]

    monkeypatch.setattr(generate_benchmark, "trained_logprobs", worse)
    (problem,) = measure_generation("tiny", [TASK], {}, CPU).problems
    assert problem == "ours: a log-probability is 1 nats from that of training's forward pass, at most 0.0001"


def test_an_engine_that_stops_early_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = GenerationFigures(1.0, 0.5, 1, (5, 6), (-1.0, -1.0))
    monkeypatch.setattr(generate_benchmark, "generate_own", lambda _: figures)
    result = measure_generation("tiny", [TASK], {"peer": lambda *_: figures}, CPU)
    assert result.problems == ["ours: it generated 2 tokens, expected 4"]
    assert result.measurements[1].failed == "there is nothing to compare it with"


def test_the_floor_of_one_text_reads_its_experts_and_its_cache() -> None:
    """A step reads the weights of its token: all but the embedding and the experts that it does not choose."""
    counts = count_parameters(MODEL)
    chosen = counts.routed_experts * MODEL.num_experts_per_tok // MODEL.n_routed_experts
    weights = counts.total - counts.embedding - counts.routed_experts + chosen
    latents = (TASK.prompt + TASK.new / 2) * MODEL.num_hidden_layers * (MODEL.kv_lora_rank + MODEL.qk_rope_head_dim)
    floor = generation_floor(replace(TASK, batch=1), replace(CEILINGS, bf16_tflops=1e9))
    assert floor.step_seconds == pytest.approx(4 * (weights + latents) / 1e12)
    many = generation_floor(replace(TASK, batch=10_000), CEILINGS)
    assert many.memory_bytes > 4 * counts.total
    assert many.seconds(4) == many.prompt_seconds + 3 * many.step_seconds


def test_ours_is_compared_with_the_fastest_peer_of_its_batch() -> None:
    floor = generation_floor(TASK, CEILINGS)

    def measured(system: str, seconds: float, is_ours: bool = False) -> GenerationMeasurement:
        figures = GenerationFigures(seconds, seconds / 2, 2**30, (1,), (-1.0,), notes=f"{system} 1.0")
        return GenerationMeasurement(TASK, system, is_ours, floor, figures, 0.0)

    rows = [measured("ours", 1.0, is_ours=True), measured("slow", 4.0), measured("fast", 2.0)]
    result = GenerationBenchmark("tiny", CPU, CEILINGS, {}, rows)
    assert [line.split()[-1] for line in result.table()[3:6]] == ["2.00×", "–", "–"]
    assert "slow: slow 1.0" in result.explanations()


def test_texts_longer_than_the_context_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="--prompt 61 and --new 4: together longer than the shape's context of 64"
    ):
        measure_generation("tiny", [replace(TASK, prompt=61)], {}, CPU)


def test_no_prediction_layer_and_no_end_of_text() -> None:
    model = build_model(TASK)
    assert not model.head_weight_VD[0].any()
    assert model.head_weight_VD[1:].any(-1).all()


def test_the_command_measures_a_run_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    output = tmp_path / "found.json"
    sizes = ["--batch", "1", "--prompt", "6", "--new", "3", "--device", "cpu"]
    result = dsv3("bench", "generate", "--shape", run, *sizes, "--output", output)
    assert result.exit_code == 0, result.output
    assert "--peers transformers" in result.output
    found = json.loads(output.read_text())
    assert (found["prompt_tokens"], found["new_tokens"], found["dtype"]) == (6, 3, "float32")
    assert found["measurements"][0]["logprob_difference"] <= 1e-4


def test_unknown_peers_and_shapes_are_refused() -> None:
    assert "--peers vllm: expected transformers" in message_of(dsv3("bench", "generate", "--peers", "vllm"))
    assert "--shape nothing: expected" in message_of(dsv3("bench", "generate", "--shape", "nothing"))

"""Measures generation by the engine and by other systems, each at one batch in a process of its own.

A system's log-probabilities of the same tokens are compared with those of training's forward pass, and only a
system that agrees has a speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.benchmark.ceilings import Ceilings, measure_ceilings
from deepseek_v3.benchmark.environment import environment
from deepseek_v3.benchmark.own_generation import (
    GenerationFigures,
    GenerationTask,
    generate_own,
    trained_logprobs,
    write_weights,
)
from deepseek_v3.benchmark.processes import run_apart
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.kv_compression import latent_format
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.flops import forward_flops, head_flops
from deepseek_v3.utils.errors import BenchmarkError, ConfigError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import gibibytes, table

GenerationPeer = Callable[[GenerationTask, Path, tuple[int, ...]], GenerationFigures]

# The largest difference of a log-probability, in nats. The engine sums in another order than training's forward
# pass; in bfloat16 also its states are rounded at other places.
_MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

_log = get_logger("Bench")


@dataclass(frozen=True)
class GenerationFloor:
    """The least seconds of the prompts, and of one step that adds a token to every text, at the measured rates.

    A step reads every weight that its tokens are multiplied with, and the cache, once. Its products are those of
    the active weights, and of the queries with the latents (absorbed). `memory_bytes`: weights and cache.
    """

    prompt_seconds: float
    step_seconds: float
    memory_bytes: float

    def seconds(self, new: int) -> float:
        """Of `new` tokens: the first one needs the prompts alone."""
        return self.prompt_seconds + (new - 1) * self.step_seconds


def generation_floor(task: GenerationTask, ceilings: Ceilings) -> GenerationFloor:
    """The floor of a task; the middle of the generation stands for every step."""
    model, width = task.model, task.dtype.itemsize
    counts = count_parameters(model)
    head = model.vocab_size * model.hidden_size
    embedding = 0 if model.tie_word_embeddings else counts.embedding
    context = task.prompt + task.new / 2
    row_bytes = latent_format(model, task.dtype).row_bytes
    read = width * (counts.total - embedding - counts.routed_experts * (1 - _share_of_experts(model, task.batch)))
    read += task.batch * context * model.num_hidden_layers * row_bytes
    pairs = task.batch * context * model.num_hidden_layers * model.num_attention_heads
    operations = 2.0 * task.batch * count_active_parameters(model)
    operations += 2.0 * pairs * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
    prompts = task.prompt * (forward_flops(model, task.prompt).total - head_flops(model)) + 2 * head
    cache = task.batch * (task.prompt + task.new) * model.num_hidden_layers * row_bytes
    return GenerationFloor(
        prompt_seconds=ceilings.product_seconds(task.batch * prompts, in_fp8=False),
        step_seconds=max(ceilings.product_seconds(operations, in_fp8=False), ceilings.copy_seconds(read)),
        memory_bytes=width * counts.total + cache,
    )


def _share_of_experts(model: ModelConfig, batch: int) -> float:
    """The expected share of a layer's experts that a batch of tokens chooses, if all are equally probable."""
    return float(1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** batch)


@dataclass(frozen=True)
class GenerationMeasurement:
    """One system at one batch: figures, or why there are none. `difference` of log-probabilities, in nats."""

    task: GenerationTask
    system: str
    is_ours: bool
    floor: GenerationFloor
    figures: GenerationFigures | None = None
    difference: float | None = None
    failed: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens of the whole batch over the time from prompts to the last token."""
        return None if self.figures is None else self.task.batch * self.task.new / self.figures.seconds

    @property
    def step_seconds(self) -> float | None:
        """The mean time of a step after the first token."""
        if self.figures is None or self.task.new == 1:
            return None
        return (self.figures.seconds - self.figures.first_seconds) / (self.task.new - 1)

    def as_json(self) -> dict[str, Any]:
        """Everything about it."""
        figures = self.figures
        return {
            "batch": self.task.batch,
            "system": self.system,
            "is_ours": self.is_ours,
            "logprob_difference": self.difference,
            "allowed_difference": _MOST_DIFFERENCE[self.task.dtype],
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step_seconds,
            "seconds": None if figures is None else figures.seconds,
            "first_token_seconds": None if figures is None else figures.first_seconds,
            "memory_bytes": None if figures is None else figures.memory_bytes,
            "floor": {**asdict(self.floor), "seconds": self.floor.seconds(self.task.new)},
            "notes": "" if figures is None else figures.notes,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class GenerationBenchmark:
    """All measurements of a run; `made_with` is the environment at its start."""

    shape: str
    device: torch.device
    ceilings: Ceilings
    made_with: dict[str, object]
    measurements: list[GenerationMeasurement] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the engine; a peer that fails is only listed."""
        return [f"{each.system}: {each.failed}" for each in self.measurements if each.is_ours and each.failed]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        task = self.measurements[0].task
        return {
            "command": "bench generate",
            **self.made_with,
            "shape": self.shape,
            "parameters": count_parameters(task.model).total,
            "dtype": str(task.dtype).removeprefix("torch."),
            "prompt_tokens": task.prompt,
            "new_tokens": task.new,
            "batch_invariant": task.batch_invariant,
            "ceilings": asdict(self.ceilings),
            "measurements": [each.as_json() for each in self.measurements],
        }

    def explanations(self) -> list[str]:
        """What the reader of the table must know."""
        found = [(each.system, each.figures) for each in self.measurements if each.figures is not None]
        notes = {f"{system}: {figures.notes}": None for system, figures in found if figures.notes}
        reasons = [
            f"{each.system}, batch {each.task.batch}: no figures: {each.failed}"
            for each in self.measurements
            if each.failed and not each.is_ours
        ]
        on_cpu = (
            "On a CPU the floors, from a small product in bfloat16 and a copy, are out of reach of small models."
        )
        floors = on_cpu if self.device.type == "cpu" else self.ceilings.describe(self.device)
        return [floors, *notes, *reasons]

    def table(self) -> list[str]:
        """The lines of a table with a row per batch and system, `figure / floor` in its cells."""
        header = ["batch", "by", "tokens/s", "ms a step", "s to the first", "GiB", "of the floor", "ours / peer"]
        rows = [
            [str(each.task.batch), each.system, *_cells(each), self._beside_the_peer(each)]
            for each in self.measurements
        ]
        task = self.measurements[0].task
        title = f"{self.shape}, prompts of {task.prompt:,} tokens, {task.new:,} new ones, figure / floor"
        return [title, *table(header, rows, left=header[:2]), ""]

    def _beside_the_peer(self, ours: GenerationMeasurement) -> str:
        """Our tokens per second over those of the fastest peer at this batch."""
        rates = [
            each.tokens_per_second
            for each in self.measurements
            if each.task.batch == ours.task.batch and not each.is_ours and each.tokens_per_second
        ]
        if not (ours.is_ours and ours.tokens_per_second and rates):
            return "–"
        return f"{ours.tokens_per_second / max(rates):.2f}×"


def _cells(each: GenerationMeasurement) -> list[str]:
    figures, floor, new = each.figures, each.floor, each.task.new
    if figures is None or each.tokens_per_second is None:
        return ["–"] * 5
    least = floor.seconds(new)
    step = "–" if each.step_seconds is None else f"{1e3 * each.step_seconds:,.2f} / {1e3 * floor.step_seconds:,.2f}"
    return [
        f"{each.tokens_per_second:,.0f} / {each.task.batch * new / least:,.0f}",
        step,
        f"{figures.first_seconds:.3f} / {floor.prompt_seconds:.3f}",
        f"{gibibytes(figures.memory_bytes)} / {gibibytes(floor.memory_bytes)}",
        f"{least / figures.seconds:.0%}",
    ]


def measure_generation(
    shape: str,
    tasks: Sequence[GenerationTask],
    peers: dict[str, GenerationPeer],
    device: torch.device,
    commit: str | None = None,
    keep: Callable[[GenerationBenchmark], None] = lambda _: None,
) -> GenerationBenchmark:
    """Checks and times the engine and the peers on every task; all tasks have the same model.

    `keep` receives the result after each system. A system that fails, or fails its check, is part of the result
    with the reason. Raises ConfigError for texts that are longer than the model's context.
    """
    for task in tasks:
        if task.prompt + task.new > task.model.max_position_embeddings:
            raise ConfigError(
                f"--prompt {task.prompt} and --new {task.new}: together longer than the shape's context of "
                f"{task.model.max_position_embeddings} tokens; take fewer"
            )
    _log.info("Measuring what this device can reach: a product of each type, a copy")
    made_with = environment("torch", "triton", "transformers", commit=commit)
    result = GenerationBenchmark(shape, device, run_apart(measure_ceilings, device), made_with)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        if peers:
            _log.info("Writing the random weights for the other systems")
            run_apart(write_weights, tasks[0], weights)
        for task in tasks:
            floor = generation_floor(task, result.ceilings)
            _log.info(f"ours: batch {task.batch}")
            ours, expected = _measure_own(task, floor)
            result.measurements.append(ours)
            keep(result)
            for name, generate in peers.items():
                _log.info(f"{name}: batch {task.batch}")
                result.measurements.append(_measure_peer(task, floor, name, generate, weights, ours, expected))
                keep(result)
    return result


def _measure_own(task: GenerationTask, floor: GenerationFloor) -> tuple[GenerationMeasurement, list[float]]:
    """The engine's figures, and the log-probabilities of its tokens by training's forward pass."""
    try:
        figures = run_apart(generate_own, task)
        expected = run_apart(trained_logprobs, task, figures.tokens)
    except BenchmarkError as error:
        return GenerationMeasurement(task, "ours", True, floor, failed=str(error)), []
    if len(figures.tokens) != task.new:
        failed = f"it generated {len(figures.tokens)} tokens, expected {task.new}"
        return GenerationMeasurement(task, "ours", True, floor, failed=failed), []
    return _checked(task, "ours", True, floor, figures, expected), expected


def _measure_peer(
    task: GenerationTask,
    floor: GenerationFloor,
    name: str,
    generate: GenerationPeer,
    weights: Path,
    ours: GenerationMeasurement,
    expected: Sequence[float],
) -> GenerationMeasurement:
    if ours.figures is None:
        return GenerationMeasurement(task, name, False, floor, failed="there is nothing to compare it with")
    try:
        figures = run_apart(generate, task, weights, ours.figures.tokens)
    except BenchmarkError as error:
        return GenerationMeasurement(task, name, False, floor, failed=str(error))
    return _checked(task, name, False, floor, figures, expected)


def _checked(
    task: GenerationTask,
    name: str,
    is_ours: bool,
    floor: GenerationFloor,
    figures: GenerationFigures,
    expected: Sequence[float],
) -> GenerationMeasurement:
    """A measurement whose figures count only if its log-probabilities are near the expected ones."""
    pairs = zip(figures.logprobs, expected, strict=True)
    difference, most = max(abs(one - other) for one, other in pairs), _MOST_DIFFERENCE[task.dtype]
    if not difference <= most:
        failed = (
            f"a log-probability is {difference:.2g} nats from that of training's forward pass, at most {most:g}"
        )
        return GenerationMeasurement(task, name, is_ours, floor, None, difference, failed)
    return GenerationMeasurement(task, name, is_ours, floor, figures, difference)

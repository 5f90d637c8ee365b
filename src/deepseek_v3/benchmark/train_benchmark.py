"""Measures the training of a shape by this trainer and by other systems, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.benchmark.ceilings import Ceilings, measure_ceilings
from deepseek_v3.benchmark.environment import device_name, environment
from deepseek_v3.benchmark.own_training import TrainingFigures, first_loss, train_own
from deepseek_v3.benchmark.processes import run_apart
from deepseek_v3.benchmark.shape_files import Precision, run_config
from deepseek_v3.benchmark.step_floor import StepFloor, step_floor
from deepseek_v3.benchmark.training_checks import Check, check_narrow_model, check_peer, check_run, failures
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.hardware import peak_bfloat16_flops
from deepseek_v3.training.data import open_tokens
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import BenchmarkError
from deepseek_v3.utils.logging import get_logger

_PEER_WEIGHT_BYTES = 2  # other systems keep bfloat16 weights, which is their fastest setting
_log = get_logger("Bench")


@dataclass(frozen=True)
class PeerSystem:
    """Another system: `train` takes what `train_own` takes, in bfloat16."""

    name: str
    train: Callable[[RunConfig, int, str, float], TrainingFigures]


@dataclass
class SystemResult:
    """What is known of a system: its checks, and its figures or the reason why there are none."""

    name: str
    config: RunConfig
    floor: StepFloor
    is_ours: bool
    checks: list[Check] = field(default_factory=list)
    figures: TrainingFigures | None = None
    failure: str | None = None

    @property
    def problem(self) -> str | None:
        """Why no speed of this system may be shown; None if one may."""
        failed = failures(self.checks)
        return f"its check failed: {'; '.join(failed)}" if failed else self.failure


@dataclass(frozen=True)
class TrainBenchmark:
    """The systems of one comparison, and what all of them share; `made_with` is the environment at its start."""

    shape: str
    overrides: tuple[str, ...]
    steps: int
    ceilings: Ceilings
    systems: list[SystemResult]
    made_with: dict[str, object]

    @property
    def problems(self) -> list[str]:
        """What is wrong with our own runs; a peer that fails is only listed."""
        return [f"{each.name}: {each.problem}" for each in self.systems if each.is_ours and each.problem]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured; a system whose check failed has no figures."""
        config = self.systems[0].config
        return {
            "command": "bench train",
            **self.made_with,
            "shape": self.shape,
            "overrides": list(self.overrides),
            "parameters": count_parameters(config.model).with_prediction,
            "active_parameters": count_active_parameters(config.model),
            "tokens_per_step": config.tokens_per_step,
            "steps": self.steps,
            "flops_per_token": training_flops_per_token(config.model, config.training.sequence_length),
            "ceilings": asdict(self.ceilings),
            "systems": [_system_as_json(each) for each in self.systems],
        }


def _system_as_json(system: SystemResult) -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": system.name,
        "checks": [asdict(check) for check in system.checks],
        "floor": {**asdict(system.floor), "seconds": system.floor.seconds},
    }
    if system.problem is not None or system.figures is None:
        return {**found, "failed": system.problem}
    return {**found, **speed_figures(system.config, system.figures, system.floor), **_training(system.figures)}


def _training(figures: TrainingFigures) -> dict[str, Any]:
    return {
        "tokens_per_second_range": [min(figures.rates), max(figures.rates)],
        "losses": {str(step): loss for step, loss in figures.losses.items()},
        "notes": figures.notes,
    }


def speed_figures(config: RunConfig, figures: TrainingFigures, floor: StepFloor) -> dict[str, float | None]:
    """Every figure that the table shows; `mfu` is None for a device whose published peak is not known."""
    rate, tokens = figures.tokens_per_second, config.tokens_per_step
    flops = rate * training_flops_per_token(config.model, config.training.sequence_length)
    peak = peak_bfloat16_flops(device_name()) if torch.cuda.is_available() else None
    return {
        "tokens_per_second": rate,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "step_seconds": tokens / rate,
        "share_of_floor": floor.seconds * rate / tokens,
        "memory_bytes": figures.memory_bytes,
        "first_step_seconds": figures.first_step_seconds,
    }


def measure_training(
    shape: str,
    precisions: Sequence[Precision],
    peers: Sequence[PeerSystem],
    *,
    device: str,
    steps: int,
    batch: int | None,
    overrides: Sequence[str],
    commit: str | None = None,
    keep: Callable[[TrainBenchmark], None] = lambda _: None,
) -> TrainBenchmark:
    """Checks and measures a shape in each precision, then the peers.

    `keep` receives the result after each system, so that it outlives the rest. Raises a UserError if the shape
    cannot be run here. A system that fails, or fails its check, is part of the result with the reason.
    """
    place = select_device(device)
    with tempfile.TemporaryDirectory() as folder:

        def config_of(precision: Precision, name: str) -> RunConfig:
            return run_config(shape, Path(folder) / name, steps, batch, precision, overrides)

        configs = {precision: config_of(precision, precision) for precision in precisions}
        plain = config_of("bf16", "eager")
        open_tokens(plain)  # builds them if this is the first run, so that no system has to wait for that
        _log.info("Measuring what this device can reach: a product of each type, a copy")
        ceilings = run_apart(measure_ceilings, place)
        plain_loss: float | None = None
        systems: list[SystemResult] = []
        made_with = environment("torch", "triton", "torchtitan", "transformers", commit=commit)
        result = TrainBenchmark(shape, tuple(overrides), steps, ceilings, systems, made_with)
        for precision, config in configs.items():
            system = SystemResult(
                f"ours, {precision}", config, step_floor(config, ceilings, precision == "fp8"), is_ours=True
            )
            systems.append(system)
            try:
                _log.info(f"{system.name}: checking a narrow model of this structure against float32")
                system.checks += run_apart(check_narrow_model, config, precision, device)
                if not failures(system.checks):
                    if plain_loss is None:
                        plain_loss = run_apart(first_loss, _eager(plain), device)
                    _log.info(f"{system.name}: training {steps} steps")
                    system.figures = run_apart(train_own, config, steps, device, time.time())
                    system.checks += check_run(config, system.figures, plain_loss)
            except BenchmarkError as error:
                system.failure = str(error)
            keep(result)
        for peer in peers:
            floor = step_floor(plain, ceilings, in_fp8=False, weight_bytes=_PEER_WEIGHT_BYTES)
            system = SystemResult(f"{peer.name}, bf16", plain, floor, is_ours=False)
            systems.append(system)
            _log.info(f"{system.name}: training {steps} steps")
            try:
                system.figures = run_apart(peer.train, plain, steps, device, time.time())
                system.checks += check_peer(plain, system.figures)
            except BenchmarkError as error:
                system.failure = str(error)
            keep(result)
    return result


def _eager(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"compile": False})})

"""Measures training steps on this GPU, and fits the planner to them: `python benchmarks/calibrate_planner.py`.

Runs the trainer's own step on each point of `planner_points.yaml`, records memory, time, and time by kind of
kernel, fits the factors of the step-time model to the kinds, and writes both `results/planner_points.json` and
`src/deepseek_v3/planning/calibration.json`. With --fit-only it fits again to the points already measured.
"""

from __future__ import annotations

import gc
import json
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from environment import RESULTS, ROOT, environment
from torch.profiler import ProfilerActivity, profile

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.calibration import CALIBRATION_FILE, Calibration, Rates
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.memory import estimate_memory
from deepseek_v3.planning.step_time import compute_seconds, ideal_seconds, step_work
from deepseek_v3.training.kernel_table import kernels_in, sum_kernels
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.logging import configure_logging

POINTS = Path(__file__).with_name("planner_points.yaml")
_WARM_UP_STEPS, _TIMED_STEPS = 4, 8

# Kinds of kernels that are fitted by themselves. The rest move memory.
_KINDS = {"attention": "attention", "experts": "experts", "matrix products": "matrices"}


def main(
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Fit to the points already measured.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure, fit, compare, write."""
    configure_logging()
    device = select_device("cpu" if fit_only else "cuda")
    results = RESULTS / "planner_points.json"
    if fit_only:
        record = json.loads(results.read_text(encoding="utf-8"))
    else:
        wanted = yaml.safe_load(POINTS.read_text(encoding="utf-8"))
        points = [
            measure({**point, "overrides": wanted["run"] + point["overrides"]}, device)
            for point in wanted["points"]
        ]
        record = {**environment("torch", commit=commit), "context_gib": _context_gib(), "points": points}
    described = find_device(str(record["device"]))
    if described is None:
        raise SystemExit(f"{record['device']}: not in the planner's table of devices; add it there first")
    calibration = fit(record, described)
    CALIBRATION_FILE.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")
    for point in record["points"]:
        point.update(compare(point, calibration, described))
        others = {**record, "points": [other for other in record["points"] if other is not point]}
        point["time_error_left_out"] = compare(point, fit(others, described), described)["time_error"]
        typer.echo(
            f"{point['name']:24} {point['measured_gib']:7.2f} GiB {point['memory_error']:+7.2%}   "
            f"{point['measured_seconds'] * 1e3:7.1f} ms {point['time_error']:+7.2%} "
            f"(fitted without it {point['time_error_left_out']:+7.2%})"
        )
    results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(point: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Memory of all steps, first included; time of warm ones, run as in training; and kernel time by kind."""
    config = _config(point)
    _forget_earlier_points()
    trainer = Trainer(config, device)
    batches = trainer.batches()
    _seconds(trainer, batches, _WARM_UP_STEPS)
    seconds = _seconds(trainer, batches, _TIMED_STEPS) / _TIMED_STEPS
    gib = 2**30
    measured = {
        **point,
        "measured_gib": torch.cuda.max_memory_allocated() / gib,
        "reserved_gib": torch.cuda.max_memory_reserved() / gib,
        "measured_seconds": seconds,
        "kernel_seconds": _kernel_seconds(trainer, batches),
    }
    batches.close()
    typer.echo(json.dumps(measured))
    return measured


def _config(point: dict[str, Any]) -> RunConfig:
    return load_config(ROOT / point["config"], point["overrides"])


def _context_gib() -> float:
    """What is taken on the GPU beside torch's allocator: the driver's context and loaded kernels."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 2**30


def _forget_earlier_points() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    left = torch.cuda.memory_allocated() / 2**20
    if left > 128:
        raise SystemExit(f"{left:.0f} MiB of an earlier point are still held; its memory would count twice")


def _seconds(trainer: Trainer, batches: Any, steps: int) -> float:
    """Seconds of `steps` steps, with the host running ahead of the GPU as in training."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(1, 1 + steps):
        trainer._train_step(trainer.plan.step(number), next(batches))
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _kernel_seconds(trainer: Trainer, batches: Any) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _seconds(trainer, batches, 1)
    seconds: dict[str, float] = defaultdict(float)
    for work in sum_kernels(kernels_in(profiler.events() or [])):
        seconds[_KINDS.get(work.kind, "memory")] += work.microseconds / 1e6
    return dict(seconds)


def fit(record: dict[str, Any], device: Device) -> Calibration:
    """Factors by least squares on relative errors, each kind of kernel by itself."""
    points = record["points"]
    compiled = _fit_compiled([point for point in points if _run(point, device).compiled], device)
    return Calibration(
        fitted_on=f"{record['device']}, torch {record['versions']['torch']}",
        bfloat16=compiled,
        float32=_fit_eager([point for point in points if not _run(point, device).compiled], device, compiled),
        # The mean, not the most: what the allocator holds beyond its peak, it gives back when memory runs short.
        allocator_overhead=mean(point["reserved_gib"] / point["measured_gib"] for point in points) - 1,
        context_bytes=record["context_gib"] * 2**30,
    )


def _fit_compiled(points: list[dict[str, Any]], device: Device) -> Rates:
    """Every factor by itself; the experts' kernels are separated from other products."""
    ideal = [_ideal_seconds(point, device) for point in points]
    (matrices,) = _factors(points, ideal, "matrices", ["matrices"])
    experts, expert_bytes = _factors(points, ideal, "experts", ["experts", "expert_bytes"])
    attention, masked_attention = _factors(points, ideal, "attention", ["attention", "masked_attention"])
    activations, logits, weights = _factors(points, ideal, "memory", ["activations", "logits", "weights"])
    per_layer, per_step = _gaps(points, ideal)
    return Rates(
        matrices=matrices,
        experts=experts,
        expert_bytes=expert_bytes,
        attention=attention,
        masked_attention=masked_attention,
        activations=activations,
        logits=logits,
        weights=weights,
        seconds_per_layer=per_layer,
        seconds_per_step=per_step,
    )


def _fit_eager(points: list[dict[str, Any]], device: Device, compiled: Rates) -> Rates:
    """The experts run as ordinary products; logits and weights pass through the same kernels as when compiled.

    Products and attention are fitted in float32 alone: eager bfloat16 shares those of compiled layers.
    """
    ideal = [_ideal_seconds(point, device) for point in points]
    known = [compiled.logits * seconds["logits"] + compiled.weights * seconds["weights"] for seconds in ideal]
    moved = [point["kernel_seconds"]["memory"] - other for point, other in zip(points, known, strict=True)]
    (activations,) = _least_squares([[seconds["activations"]] for seconds in ideal], moved, moved)
    wide = [index for index, point in enumerate(points) if _run(point, device).width == 4]
    points, ideal = [points[index] for index in wide], [ideal[index] for index in wide]
    for seconds in ideal:
        seconds["products"] = seconds["matrices"] + seconds["experts"]
    (products,) = _factors(points, ideal, "matrices", ["products"])
    (attention,) = _factors(points, ideal, "attention", ["attention"])
    per_layer, per_step = _gaps(points, ideal)
    return replace(
        compiled,
        matrices=products,
        experts=products,
        expert_bytes=0.0,
        attention=attention,
        masked_attention=attention,
        activations=activations,
        seconds_per_layer=per_layer,
        seconds_per_step=per_step,
    )


def _ideal_seconds(point: dict[str, Any], device: Device) -> dict[str, float]:
    """What each factor is multiplied with at this point."""
    config = _config(point)
    run = resolve_execution(device, config)
    return ideal_seconds(step_work(config, run), run, device)


def _factors(
    points: list[dict[str, Any]], ideal: list[dict[str, float]], kernel: str, kinds: list[str]
) -> list[float]:
    measured = [point["kernel_seconds"][kernel] for point in points]
    return _least_squares([[seconds[kind] for kind in kinds] for seconds in ideal], measured, measured)


def _gaps(points: list[dict[str, Any]], ideal: list[dict[str, float]]) -> list[float]:
    """Time in which no kernel ran: seconds per layer and seconds per step, as shares of the whole step."""
    whole = [point["measured_seconds"] for point in points]
    idle = [
        max(0.0, seconds - sum(point["kernel_seconds"].values()))
        for seconds, point in zip(whole, points, strict=True)
    ]
    fixed = [[seconds["seconds_per_layer"], seconds["seconds_per_step"]] for seconds in ideal]
    return _least_squares(fixed, idle, whole)


def _least_squares(columns: list[list[float]], measured: list[float], scale: list[float]) -> list[float]:
    """Factors of least squared error over `scale`; one that came out negative is 0, and the rest fitted again."""
    matrix, target = np.array(columns) / np.array(scale)[:, None], np.array(measured) / np.array(scale)
    used = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
        if solution.min() >= 0:
            break
        used.pop(int(solution.argmin()))
    factors = np.zeros(matrix.shape[1])
    factors[used] = solution
    return [float(factor) for factor in factors]


def compare(point: dict[str, Any], calibration: Calibration, device: Device) -> dict[str, float]:
    """The planner's estimates beside the measurement, and their relative errors."""
    config = _config(point)
    run = resolve_execution(device, config)
    memory = estimate_memory(config, run)
    seconds = sum(compute_seconds(step_work(config, run), calibration.rates(run), run, device).values())
    return {
        "estimated_gib": memory.total / 2**30,
        "memory_error": memory.total / 2**30 / point["measured_gib"] - 1,
        "estimated_seconds": seconds,
        "time_error": seconds / point["measured_seconds"] - 1,
    }


def _run(point: dict[str, Any], device: Device) -> Execution:
    return resolve_execution(device, _config(point))


if __name__ == "__main__":
    typer.run(main)

"""Measures training steps on this GPU, and fits the planner to them: `python benchmarks/calibrate_planner.py`.

Runs the trainer's own step on each point of `planner_points.yaml`, or on those of --points, and records memory,
time, and time by kind of kernel in `results/planner_points_DEVICE.json`, beside the points that the device's file
holds already. It then fits the factors of the step-time model to those that are not held out, and replaces the
device's part of `src/deepseek_v3/planning/calibration.json`. With --fit-only it only fits, for every device.
"""

from __future__ import annotations

import gc
import json
import time
from collections import defaultdict
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from environment import RESULTS, ROOT, environment, select_gpu
from torch.profiler import ProfilerActivity, profile

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.ops.multi_tensor import triton as multi_tensor_kernels
from deepseek_v3.planning.calibration import CALIBRATION_FILE, Calibration, Rates, nearest_fit, read_fits
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.memory import estimate_memory
from deepseek_v3.planning.step_time import compute_seconds, ideal_seconds, launch_seconds, step_work
from deepseek_v3.training.kernel_table import kernels_in, sum_kernels
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.logging import configure_logging

POINTS = Path(__file__).with_name("planner_points.yaml")
_WARM_UP_STEPS, _TIMED_STEPS = 3, 5

# Kinds of kernels that are fitted by themselves. The rest move memory.
_KINDS = {
    "attention": "attention",
    "experts": "experts",
    "matrix products": "matrices",
    "FP8 products": "FP8 products",
    "quantization": "quantization",
}

# Factors of FP8 until it has been measured, and the factors of bfloat16 whose values they take.
_AS_IN_BFLOAT16 = {"fp8_matrices": "matrices", "fp8_experts": "experts", "quantization": "weights"}


class TooFewPointsError(SystemExit):
    """Some factor is exercised by too few points, and there is no other device whose factor could be taken."""


def main(
    points: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure this point only; repeatable.")
    ] = None,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Fit to the points already measured.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure, fit, compare, write."""
    configure_logging()
    files = sorted(RESULTS.glob("planner_points_*.json")) if fit_only else [_measure_points(points, commit)]
    for file in files:
        _fit_device(file)


def _measure_points(names: list[str] | None, commit: str | None) -> Path:
    """Measures points on this GPU and stores them, each in place of its earlier measurement; returns the file."""
    wanted = yaml.safe_load(POINTS.read_text(encoding="utf-8"))
    known = {
        point["name"]: {**point, "overrides": wanted["run"] + point["overrides"]} for point in wanted["points"]
    }
    if unknown := set(names or ()) - known.keys():
        raise SystemExit(f"--points {', '.join(sorted(unknown))}: {POINTS.name} has {', '.join(known)}")
    device = select_gpu()
    described = _described(torch.cuda.get_device_name(device))
    file = RESULTS / f"planner_points_{described.name.lower().replace(' ', '_')}.json"
    stored = json.loads(file.read_text(encoding="utf-8"))["points"] if file.is_file() else []
    measured = {point["name"]: point for point in stored}
    for name in names or known:
        measured[name] = measure(known[name], device)
        record = {**environment("torch", commit=commit), "context_gib": _context_gib()}
        in_order = [measured[name] for name in known if name in measured]
        _write_json(file, {**record, "points": in_order})  # after each point, so that a run may be stopped
    return file


def _fit_device(file: Path) -> None:
    """Fits the factors of one device to its stored points; writes them, and the estimates beside the points."""
    record = json.loads(file.read_text(encoding="utf-8"))
    device = _described(str(record["device"]))
    others = [other for other in read_fits() if other.device != device.name]
    nearest = nearest_fit(others, device) if others else None
    calibration = fit(record, device, nearest)
    fits = sorted([*others, calibration], key=lambda each: each.device)
    _write_json(CALIBRATION_FILE, [asdict(each) for each in fits])
    for point in record["points"]:
        point.update(compare(point, calibration, device))
        point["time_error_left_out"] = _error_left_out(point, record, device)
        typer.echo(_table_row(point))
    _write_json(file, record)


def _error_left_out(point: dict[str, Any], record: dict[str, Any], device: Device) -> float | None:
    """The error of the time if the factors are fitted without this point; None if the others do not suffice."""
    others = [other for other in record["points"] if other is not point]
    try:
        calibration = fit({**record, "points": others}, device, None)
    except TooFewPointsError:
        return None
    return compare(point, calibration, device)["time_error"]


def _table_row(point: dict[str, Any]) -> str:
    """A measured point beside its estimate, as a row of `docs/measurements/planning.md`."""
    left_out = point["time_error_left_out"]
    return (
        f"| {point['name']} | {point['measured_gib']:.2f} | {point['estimated_gib']:.2f} "
        f"| {point['memory_error']:+.1%} | {point['measured_seconds'] * 1e3:.1f} "
        f"| {point['estimated_seconds'] * 1e3:.1f} | {point['time_error']:+.1%} "
        f"| {'–' if left_out is None else f'{left_out:+.1%}'} |"
    )


def _described(name: str) -> Device:
    device = find_device(name)
    if device is None:
        raise SystemExit(f"{name}: not in the planner's table of devices; add it there first")
    return device


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    multi_tensor_kernels._blocks.cache_clear()  # the optimizer's tables, kept for each model that a process trains
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


def fit(record: dict[str, Any], device: Device, nearest: Calibration | None) -> Calibration:
    """Factors by least squares on relative errors, each kind of kernel by itself.

    A factor that too few points exercise is that of the `nearest` device.
    """
    points = [point for point in record["points"] if not point.get("held_out")]
    compiled = [point for point in points if _run(point, device).compiled]
    eager = [point for point in points if not _run(point, device).compiled]
    bfloat16 = _fit_compiled(compiled, device, nearest.bfloat16 if nearest else None)
    return Calibration(
        device=device.name,
        fitted_on=f"{record['device']}, torch {record['versions']['torch']}",
        bfloat16=bfloat16,
        float32=_fit_eager(eager, device, bfloat16, nearest.float32 if nearest else None),
        # The mean, not the most: what the allocator holds beyond its peak, it gives back when memory runs short.
        allocator_overhead=mean(point["reserved_gib"] / point["measured_gib"] for point in points) - 1,
        context_bytes=record["context_gib"] * 2**30,
    )


def _fit_compiled(points: list[dict[str, Any]], device: Device, nearest: Rates | None) -> Rates:
    """Every factor by itself; the experts' kernels are separated from other products.

    In FP8 one kernel computes all products. Until it has been measured, it reaches the share of the peak that
    products in bfloat16 reach, and the kernels that quantize have the bandwidth of those that update weights.
    """
    narrow = [point for point in points if not _run(point, device).fp8]
    ideal = [_ideal_seconds(point, device) for point in narrow]
    fitted = _factors(narrow, ideal, "matrices", ["matrices"])
    fitted |= _factors(narrow, ideal, "experts", ["experts", "expert_bytes"])
    fitted |= _factors(narrow, ideal, "attention", ["attention", "masked_attention"])
    fitted |= _factors(narrow, ideal, "memory", ["activations", "logits", "weights"])
    fitted |= _gaps(narrow, ideal, device)
    rates = _rates(fitted, nearest)
    points = [point for point in points if _run(point, device).fp8]
    ideal = [_ideal_seconds(point, device) for point in points]
    known = {"expert_bytes": rates.expert_bytes}
    fp8 = _factors(points, ideal, "FP8 products", ["fp8_matrices", "fp8_experts"], known)
    fp8 |= _factors(points, ideal, "quantization", ["quantization"])
    return replace(rates, **fp8, assumed=tuple(name for name in rates.assumed if name not in fp8))


def _fit_eager(points: list[dict[str, Any]], device: Device, compiled: Rates, nearest: Rates | None) -> Rates:
    """The experts run as ordinary products; logits and weights pass through the same kernels as when compiled.

    Products and attention are fitted in float32 alone: eager bfloat16 shares those of compiled layers.
    """
    ideal = [_ideal_seconds(point, device) for point in points]
    moved = {"logits": compiled.logits, "weights": compiled.weights}
    fitted = moved | _factors(points, ideal, "memory", ["activations"], moved)
    wide = [index for index, point in enumerate(points) if _run(point, device).width == 4]
    points, ideal = [points[index] for index in wide], [ideal[index] for index in wide]
    for seconds in ideal:
        seconds["matrices"] += seconds["experts"]
    fitted |= _factors(points, ideal, "matrices", ["matrices"])
    fitted |= _factors(points, ideal, "attention", ["attention"])
    fitted |= _gaps(points, ideal, device)
    if "matrices" in fitted:
        fitted |= {"experts": fitted["matrices"], "expert_bytes": 0.0}
    if "attention" in fitted:
        fitted["masked_attention"] = fitted["attention"]
    return _rates(fitted, nearest)


def _rates(fitted: dict[str, float], nearest: Rates | None) -> Rates:
    """Completes the fitted factors by those of the nearest device; those of FP8, if it has none, by bfloat16's."""
    missing = [field.name for field in fields(Rates) if field.name not in {*fitted, "assumed", *_AS_IN_BFLOAT16}]
    if missing and nearest is None:
        raise TooFewPointsError(
            f"too few points to fit {', '.join(missing)}, and no other device to take them from"
        )
    rates = {**fitted, **{name: getattr(nearest, name) for name in missing}}
    for name, like in _AS_IN_BFLOAT16.items():
        rates[name] = getattr(nearest, name) if nearest and name not in nearest.assumed else rates[like]
    return Rates(**rates, assumed=(*missing, *_AS_IN_BFLOAT16))


def _ideal_seconds(point: dict[str, Any], device: Device) -> dict[str, float]:
    """What each factor is multiplied with at this point."""
    config = _config(point)
    run = resolve_execution(device, config)
    return ideal_seconds(step_work(config, run), run, device)


def _factors(
    points: list[dict[str, Any]],
    ideal: list[dict[str, float]],
    kernel: str,
    names: list[str],
    known: dict[str, float] | None = None,
) -> dict[str, float]:
    """Factors of one kind of kernels, whose measured time includes that of the `known` factors."""
    times = [point["kernel_seconds"].get(kernel, 0.0) for point in points]
    ran = [(seconds, time) for seconds, time in zip(ideal, times, strict=True) if time > 0]
    left = [time - sum(factor * seconds[name] for name, factor in (known or {}).items()) for seconds, time in ran]
    return _solve(names, [seconds for seconds, _ in ran], left, left)


def _gaps(points: list[dict[str, Any]], ideal: list[dict[str, float]], device: Device) -> dict[str, float]:
    """Time in which no kernel ran: seconds per layer and seconds per step, as shares of the whole step.

    Steps that are as long as the host takes to launch them say nothing about it, and are left out.
    """
    columns, idle, whole = [], [], []
    for point, seconds in zip(points, ideal, strict=True):
        kernels, config = sum(point["kernel_seconds"].values()), _config(point)
        if kernels > launch_seconds(config, step_work(config, _run(point, device)), device):
            columns.append(seconds)
            idle.append(max(0.0, point["measured_seconds"] - kernels))
            whole.append(point["measured_seconds"])
    return _solve(["seconds_per_layer", "seconds_per_step"], columns, idle, whole)


def _solve(
    names: list[str], ideal: list[dict[str, float]], measured: list[float], scale: list[float]
) -> dict[str, float]:
    """Factors of those `names` that the points exercise; none if there are fewer points than such factors."""
    used = [name for name in names if any(seconds[name] for seconds in ideal)]
    if not used or len(ideal) < len(used):
        return {}
    factors = _least_squares([[seconds[name] for name in used] for seconds in ideal], measured, scale)
    return dict(zip(used, factors, strict=True))


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
    work = step_work(config, run)
    busy = sum(compute_seconds(work, calibration.rates(run), run, device).values())
    seconds = max(busy, launch_seconds(config, work, device))
    return {
        "estimated_gib": memory.total / 2**30,
        "memory_error": memory.total / 2**30 / point["measured_gib"] - 1,
        "estimated_seconds": seconds,
        "time_error": seconds / point["measured_seconds"] - 1,
    }


def _run(point: dict[str, Any], device: Device) -> Execution:
    return resolve_execution(device, _config(point))


if __name__ == "__main__":
    run_command(main)

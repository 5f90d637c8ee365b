"""What only several GPUs of one host can show, in one go: `python benchmarks/multi_gpu.py --name h200_x2`.

    ranks      NCCL's collectives, and the way to experts beside them (`multi_gpu_ranks.py`)
    tests      layouts against one GPU in float32, and resuming under another layout
    training   tokens per second, memory and losses of a shape under every layout, each by the command that users
               type, beside the planner's estimate; the planner's own choice is one of them
    peer       torchtitan on the same model, where it is installed

Writes `results/multi_gpu_<name>.json` after each part, so that what was measured stays if the time runs out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from surroundings import RESULTS, ROOT, surroundings

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.hardware import Device, device_named
from deepseek_v3.planning.layouts import measure_layout
from deepseek_v3.utils.monitoring import read_metrics

PARTS = ("ranks", "tests", "training", "peer")
WARM_UP = 5  # steps that are left out: they compile, and meet the first memory
LONGEST = 400  # seconds for one program
TESTS = ["tests/integration/test_parallel_equality.py", "tests/integration/test_parallel_resume.py"]


@dataclass(frozen=True)
class Run:
    """One training run: its layout's settings, on how many GPUs, and words that its command has besides."""

    name: str
    gpus: int
    settings: dict[str, Any] = field(default_factory=dict)
    deepspeed_stage: int | None = None


def runs_on(gpus: int, micro: int) -> list[Run]:
    """The layouts that this many GPUs are measured under, the most telling first."""
    degrees = [degree for degree in (2, 4, 8) if degree <= gpus]
    split = [Run("FSDP", gpus, {"data_shard": gpus}), Run("planner's choice", gpus, {"layout": "auto"})]
    experts = [Run(f"EP {degree}", gpus, {"data_replicate": gpus, "expert": degree}) for degree in degrees]
    both = [Run(f"EP {degree} × FSDP", gpus, {"data_shard": gpus, "expert": degree}) for degree in degrees]
    narrow = {"data_replicate": gpus, "expert": gpus, "dispatch_precision": "fp8"}
    one_at_a_time = {"pipeline": 2, "data_replicate": gpus // 2, "micro_batch_size": max(1, micro // 4)}
    pipelines = [
        Run(f"PP 2, {schedule}", gpus, {**one_at_a_time, "pipeline_schedule": schedule})
        for schedule in ("1f1b", "interleaved", "zero_bubble", "dualpipe_v")
    ]
    return [
        Run("one GPU", 1),
        *split,
        *experts,
        Run(f"EP {gpus}, FP8 rows", gpus, narrow),
        *both,
        Run("copies", gpus, {"data_replicate": gpus}),
        Run("FSDP, ZeRO 2", gpus, {"data_shard": gpus, "zero_stage": 2}),
        *pipelines,
        Run("DeepSpeed ZeRO 3", gpus, deepspeed_stage=3),
        Run("DeepSpeed ZeRO 2", gpus, deepspeed_stage=2),
    ]


def main(
    name: Annotated[str, typer.Option(help="Of the result file.")],
    shape: Annotated[Path, typer.Option(help="A run's YAML file.")] = ROOT / "benchmarks/shapes/1b.yaml",
    gpus: Annotated[int, typer.Option(help="How many; 0 takes all.")] = 0,
    part: Annotated[list[str] | None, typer.Option(help="Only these parts; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only runs whose names begin so; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training run.")] = 20,
    micro: Annotated[int, typer.Option(help="Sequences of a micro-batch on each GPU.")] = 4,
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
    seconds: Annotated[int, typer.Option(help="Nothing is begun after so long.")] = 3000,
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = RESULTS,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure on the GPUs of this host."""
    gpus = gpus or torch.cuda.device_count()
    end = time.monotonic() + seconds
    results: dict[str, Any] = {
        **surroundings("torch", "numpy", commit=commit),
        "gpus": gpus,
        "shape": shape.stem,
        "overrides": override or [],
    }

    def keep(key: str, value: Any) -> None:
        results[key] = value
        (output / f"multi_gpu_{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"{key}: {json.dumps(value)}")

    wanted = part or PARTS
    if "ranks" in wanted:
        keep("ranks", ranks(gpus))
    if "tests" in wanted:
        keep("tests", tests())
    trained: list[dict[str, Any]] = []
    for run in runs_on(gpus, micro) if "training" in wanted else []:
        if time.monotonic() < end and (not only or run.name.startswith(tuple(only))):
            trained.append(train(run, shape, gpus, steps, micro, override or []))
            keep("training", trained)
    peers: list[dict[str, Any]] = []
    for expert in (1, gpus) if "peer" in wanted else []:
        if time.monotonic() < end:
            peers.append(torchtitan(shape, gpus, expert, steps, micro))
            keep("torchtitan", peers)


def ranks(gpus: int) -> dict[str, Any]:
    """What `multi_gpu_ranks.py` finds on so many GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        failure = run_program(launcher(gpus), "benchmarks/multi_gpu_ranks.py", "--output", str(output))
        return json.loads(output.read_text(encoding="utf-8")) if failure is None else {"failed": failure}


def tests() -> str:
    """The last line of the tests that need several GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", *TESTS], cwd=ROOT, capture_output=True, text=True
    )
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "E  "))]
    return "; ".join([*failures[:20], done.stdout.strip().splitlines()[-1]])


def train(run: Run, shape: Path, gpus: int, steps: int, micro: int, overrides: list[str]) -> dict[str, Any]:
    """Trains a shape's first steps under a layout; the batch is the same under all of them."""
    with tempfile.TemporaryDirectory() as folder:
        parallel = {"micro_batch_size": micro, **run.settings}
        words = command_settings(shape, folder, gpus * micro, steps, parallel, overrides)
        extra: list[str] = []
        if run.deepspeed_stage is not None:
            file = Path(folder) / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": run.deepspeed_stage}}), encoding="utf-8")
            extra = ["--deepspeed", str(file)]
        settings = [word for setting in words for word in ("--set", setting)]
        program = ["src/training/train.py", "--config", str(shape), *settings, *extra]
        failure = run_program(launcher(run.gpus), *program)
        found: dict[str, Any] = {"layout": run.name, "gpus": run.gpus}
        if failure is not None:
            return {**found, "failed": failure}
        return {**found, **figures(Path(folder), gpus * micro)}


def command_settings(
    shape: Path, folder: str, batch: int, steps: int, parallel: dict[str, Any], overrides: list[str]
) -> list[str]:
    """The overrides of one run, which leaves everything in `folder`."""
    length = load_config(shape).training.sequence_length
    return [
        f"training.global_batch_size={batch}",
        f"training.total_tokens={batch * length * steps}",
        "checkpoint.interval_steps=0",
        f"checkpoint.directory={folder}/checkpoints",
        f"logging.directory={folder}/run",
        "logging.interval_steps=1",
        *(f"parallel.{name}={value}" for name, value in parallel.items()),
        *overrides,
    ]


def figures(folder: Path, batch: int) -> dict[str, Any]:
    """What a run's metrics say, and what the planner expected of its layout."""
    config = load_config(folder / "run" / "config.yaml")
    records = read_metrics(folder / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    rates = [record["tokens_per_second"] for record in steps if record["step"] > WARM_UP]
    estimate = measure_layout(config, this_device())
    expected = batch * config.training.sequence_length / estimate.step.total
    return {
        "parallel": {k: v for k, v in config.parallel.model_dump().items() if v not in (1, "given", "auto")},
        "tokens_per_second": round(median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "planned_tokens_per_second": round(expected),
        "memory_gib": round(max(record["memory_bytes"] for record in steps) / 2**30, 1),
        "planned_memory_gib": round(estimate.needed_bytes / 2**30, 1),
        "losses": {str(steps[n]["step"]): steps[n]["loss"] for n in (0, len(steps) // 2 - 1, -1)},
        "held_out_loss": [record["holdout_loss"] for record in records if "holdout_loss" in record][-1],
    }


def torchtitan(shape: Path, gpus: int, expert: int, steps: int, micro: int) -> dict[str, Any]:
    """torchtitan's FSDP on the same model, with experts apart or not."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        words = ["--shape", str(shape), "--data-shard", str(gpus), "--expert", str(expert)]
        words += ["--micro-batch", str(micro), "--steps", str(steps), "--output", str(output)]
        failure = run_program(launcher(gpus), "benchmarks/peers/torchtitan_training.py", *words)
        found = json.loads(output.read_text(encoding="utf-8")) if failure is None else {"failed": failure}
        return {"expert": expert, **found}


def this_device() -> Device:
    """The planner's description of these GPUs; of a CPU where a small shape only tries the program."""
    device = device_named(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    assert device is not None
    return device


def launcher(gpus: int) -> list[str]:
    """What a program is started with on so many GPUs."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]


def run_program(*words: str | list[str]) -> str | None:
    """Runs a program from the root of the project; where it fails, its error or the end of its output."""
    command = [part for word in words for part in ([word] if isinstance(word, str) else word)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return f"took longer than {LONGEST} s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in lines if "error: " in line), "\n".join(lines[-20:]))


if __name__ == "__main__":
    typer.run(main)

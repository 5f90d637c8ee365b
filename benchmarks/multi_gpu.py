"""What only several GPUs of one host can show, in one go: `python benchmarks/multi_gpu.py --name h200_x2`.

    ranks      NCCL's collectives, and the way to experts beside them (`multi_gpu_ranks.py`)
    tests      layouts against one GPU in float32, and resuming under another layout
    training   tokens per second, memory and losses of a shape under every layout, each by the command that users
               type, beside the planner's estimate; the planner's own choice is one of them
    peer       torchtitan on the same model, where it is installed

A run ends with its last timed step, before it would save anything. Rates are those of `INTERVAL` steps each, in
which nothing waits for the GPUs, ours and torchtitan's alike.

Writes `results/multi_gpu_<name>.json` after each part, so that what was measured stays if the time runs out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil  # type: ignore[import-untyped]
import torch
import typer
from environment import RESULTS, ROOT, environment, select_gpu

from deepseek_v3.benchmark.shape_files import shape_file
from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.layout_search import estimate_layout
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.monitoring import read_metrics

SHAPE = shape_file("1b")
_TORCHTITAN = "deepseek_v3.benchmark.peers.torchtitan_training"
PARTS = ("ranks", "tests", "training", "peer")
INTERVAL = 5  # steps of one rate; the first ones are left out: they compile and allocate
COMPARED_STEPS = 20  # in which rounding has not yet led two runs apart
LONGEST = 300  # seconds for one program
POLL = 0.2  # seconds between two looks at a run's metrics
TESTS = ["tests/integration/test_parallel_equality.py", "tests/integration/test_parallel_resume.py"]


@dataclass(frozen=True)
class Run:
    """One training run: its layout's settings, on how many GPUs, and words that its command has besides."""

    name: str
    gpus: int
    settings: dict[str, Any] = field(default_factory=dict)
    deepspeed_stage: int | None = None


@dataclass(frozen=True)
class Work:
    """What every run does: a shape's first steps, of `batch` sequences in all and `micro` at once on each GPU."""

    shape: Path
    gpus: int
    steps: int
    micro: int
    batch: int
    overrides: list[str]


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
    shape: Annotated[Path, typer.Option(help="A run's YAML file.")] = SHAPE,
    gpus: Annotated[int, typer.Option(help="How many; 0 takes all.")] = 0,
    part: Annotated[list[str] | None, typer.Option(help="Only these parts; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only the runs of these names; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training run, a multiple of 5.")] = 25,
    micro: Annotated[int, typer.Option(help="Sequences of a micro-batch on each GPU.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences per step and GPU; 0 is one micro-batch.")] = 0,
    peer_micro: Annotated[int, typer.Option(help="As --micro, for torchtitan; 0 takes the same.")] = 0,
    peer_recompute: Annotated[str, typer.Option(help="none, selective or full, for torchtitan.")] = "none",
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
    seconds: Annotated[int, typer.Option(help="Nothing is begun after so long.")] = 3000,
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = RESULTS,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure on the GPUs of this host."""
    select_gpu()
    gpus = gpus or torch.cuda.device_count()
    end = time.monotonic() + seconds
    work = Work(shape, gpus, steps, micro, gpus * (batch or micro), override or [])
    results: dict[str, Any] = {
        **environment("torch", "numpy", commit=commit),
        "gpus": gpus,
        "sequences_of_a_step": work.batch,
        "shape": shape.stem,
        "overrides": work.overrides,
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
        if time.monotonic() < end and (not only or run.name in only):
            trained.append(train(run, work))
            trained[-1] |= loss_difference(trained[-1], trained[0])
            keep("training", trained)
    peers: list[dict[str, Any]] = []
    for expert in (1, gpus) if "peer" in wanted else []:
        if time.monotonic() < end:
            peers.append(torchtitan(work, expert, peer_micro or micro, peer_recompute))
            keep("torchtitan", peers)


def ranks(gpus: int) -> dict[str, Any]:
    """The figures of `multi_gpu_ranks.py` on this number of GPUs."""
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


def train(run: Run, work: Work) -> dict[str, Any]:
    """Trains a shape's first steps under a layout; the batch is the same under all of them."""
    found: dict[str, Any] = {"layout": run.name, "gpus": run.gpus}
    with tempfile.TemporaryDirectory() as folder:
        extra: list[str] = []
        if run.deepspeed_stage is not None:
            file = Path(folder) / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": run.deepspeed_stage}}), encoding="utf-8")
            extra = ["--deepspeed", str(file)]
        settings = [word for setting in command_settings(run, work, folder) for word in ("--set", setting)]
        program = ["src/training/train.py", "--config", str(work.shape), *settings, *extra]
        metrics = Path(folder) / "run" / "metrics.jsonl"
        failure = run_program(launcher(run.gpus), *program, until=lambda: last_step(metrics) >= work.steps)
        return {**found, **({"failed": failure} if failure else figures(Path(folder), work))}


def command_settings(run: Run, work: Work, folder: str) -> list[str]:
    """The overrides of one run, which leaves everything in `folder`; it would go on long after its last step."""
    length = load_config(work.shape).training.sequence_length
    parallel = {"micro_batch_size": work.micro, **run.settings}
    return [
        f"training.global_batch_size={work.batch}",
        f"training.total_tokens={work.batch * length * 10 * work.steps}",
        "checkpoint.interval_steps=0",
        f"checkpoint.directory={folder}/checkpoints",
        f"logging.directory={folder}/run",
        f"logging.interval_steps={INTERVAL}",
        *work.overrides,
        *(f"parallel.{name}={value}" for name, value in parallel.items()),
    ]


def last_step(metrics: Path) -> int:
    """The last step that a run has written figures of; 0 before the first."""
    return max((record["step"] for record in read_metrics(metrics)), default=0) if metrics.exists() else 0


def figures(folder: Path, work: Work) -> dict[str, Any]:
    """What a run's metrics say, and what the planner expected of its layout."""
    config = load_config(folder / "run" / "config.yaml")
    steps = [record for record in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in record]
    rates = [record["tokens_per_second"] for record in steps if record["step"] > INTERVAL]
    estimate = estimate_layout(config, this_device())
    expected = work.batch * config.training.sequence_length / estimate.step.total
    return {
        "parallel": {k: v for k, v in config.parallel.model_dump().items() if v not in (1, "given", "auto")},
        "tokens_per_second": round(median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "planned_tokens_per_second": round(expected),
        "memory_gib": round(max(record["memory_bytes"] for record in steps) / 2**30, 1),
        "planned_memory_gib": round(estimate.needed_bytes / 2**30, 1),
        "losses": {str(record["step"]): round(record["loss"], 4) for record in steps},
    }


def loss_difference(found: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """How far a run's losses are at most from those of the first one, which saw the same tokens, in 20 steps."""
    early = [step for step in found.get("losses", {}) if int(step) <= COMPARED_STEPS and "losses" in first]
    differences = [abs(found["losses"][step] - first["losses"][step]) for step in early]
    return {"loss_difference": round(max(differences), 4)} if differences else {}


def torchtitan(work: Work, expert: int, micro: int, recompute: str) -> dict[str, Any]:
    """torchtitan's FSDP on the same model and batch, with experts apart or not."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        words = ["--shape", str(work.shape), "--data-shard", str(work.gpus), "--expert", str(expert)]
        words += ["--micro-batch", str(micro), "--batch", str(work.batch), "--recompute", recompute]
        words += ["--steps", str(work.steps), "--interval", str(INTERVAL), "--output", str(output)]
        failure = run_program(launcher(work.gpus), "-m", _TORCHTITAN, *words)
        found = {"failed": failure} if failure else json.loads(output.read_text(encoding="utf-8"))
        return {"expert": expert, "micro_batch": micro, "recompute": recompute, **found}


def this_device() -> Device:
    """The planner's description of these GPUs; of a CPU where a small shape only tries the program."""
    device = find_device(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    assert device is not None
    return device


def launcher(gpus: int) -> list[str]:
    """The command that launches a program on this number of GPUs."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]


def run_program(*words: str | list[str], until: Callable[[], bool] = lambda: False) -> str | None:
    """Runs a program from the root of the project; where it fails, its error or the end of its output.

    It is ended, with all that it started, where it takes too long, and as soon as what it is run `until` holds.
    """
    command = [part for word in words for part in ([word] if isinstance(word, str) else word)]
    end = time.monotonic() + LONGEST
    with tempfile.TemporaryFile("w+") as output:
        program = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while program.poll() is None and time.monotonic() < end:
            if until():
                kill(program)
                return None
            time.sleep(POLL)
        if program.returncode == 0:
            return None
        kill(program)
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    if program.returncode < 0:
        lines.append(f"took longer than {LONGEST} s")
    return next((line for line in lines if "error: " in line), "\n".join(lines[-20:]))


def kill(program: subprocess.Popen[bytes]) -> None:
    """Ends a program and all that it started, at once: there is nothing to save."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started)
    program.wait()


if __name__ == "__main__":
    run_command(main)

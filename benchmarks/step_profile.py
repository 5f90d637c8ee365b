"""Where the time of a training step goes, on one GPU or, by a launcher, on several:

    torchrun --nproc_per_node=2 benchmarks/step_profile.py --output fsdp.json --set parallel.data_shard=2

Steps are timed with and without waiting for the GPU after each. Where launching them takes as long as the step, the
CPU is what holds it up. Then three steps are traced, and kernels summed by name.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from environment import environment, select_gpu
from torch.profiler import ProfilerActivity, profile

from deepseek_v3.benchmark.shape_files import shape_file
from deepseek_v3.config.loading import load_config
from deepseek_v3.training.kernel_table import kernels_in, sum_kernels
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.distributed.launch import World, process_group
from deepseek_v3.utils.logging import configure_logging

SHAPE = shape_file("1b")
WARM_UP, TIMED, TRACED, LISTED = 6, 8, 3, 30


def main(
    output: Annotated[Path, typer.Option(help="Where rank 0 writes its JSON.")],
    shape: Annotated[Path, typer.Option(help="A run's YAML file.")] = SHAPE,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Time and trace the first steps of a run."""
    world = World.from_environment()
    configure_logging(logging.WARNING)
    device = select_gpu(world)
    with process_group(world, device, timedelta(minutes=5)), TemporaryDirectory() as folder:
        places = [f"checkpoint.directory={folder}/checkpoints", f"logging.directory={folder}/run"]
        config = load_config(shape, [*places, *(override or [])])
        trainer = Trainer(config, device, mesh=build_mesh(config.parallel, "cuda", world.local_size))
        steps = Steps(trainer)
        steps.take(WARM_UP)
        found = {
            **environment("torch", commit=commit),
            "shape": shape.stem,
            "overrides": override or [],
            "tokens_per_step": config.tokens_per_step,
            "in_a_row": steps.timed(wait=False),
            "one_by_one": steps.timed(wait=True),
            **steps.traced(),
        }
    if world.rank == 0:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        typer.echo(json.dumps(found, indent=2))


class Steps:
    """The steps of a run, one after another."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._number = trainer, 0
        self._batches = trainer.batches()

    def take(self, count: int) -> None:
        """Launches `count` steps and does not wait for them."""
        for _ in range(count):
            self._number += 1
            self._trainer._train_step(self._trainer.plan.step(self._number), next(self._batches))

    def timed(self, wait: bool) -> dict[str, float]:
        """Milliseconds of a step, and of launching it; `wait` for the GPU after each step or only at the end."""
        torch.cuda.synchronize()
        start, launching = time.perf_counter(), 0.0
        for _ in range(TIMED):
            before = time.perf_counter()
            self.take(1)
            launching += time.perf_counter() - before
            if wait:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        step = (time.perf_counter() - start) / TIMED
        return {"step_ms": round(1e3 * step, 1), "launching_ms": round(1e3 * launching / TIMED, 1)}

    def traced(self) -> dict[str, Any]:
        """Kernels of a step, with the milliseconds that each takes."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            self.take(TRACED)
            torch.cuda.synchronize()
        works = sum_kernels(kernels_in(trace.events() or []))
        return {
            "kernels": round(sum(work.calls for work in works) / TRACED),
            "longest": [
                {
                    "name": work.name[:100],
                    "kind": work.kind,
                    "times": round(work.calls / TRACED, 1),
                    "ms": round(work.microseconds / 1e3 / TRACED, 2),
                }
                for work in works[:LISTED]
            ],
        }


if __name__ == "__main__":
    run_command(main)

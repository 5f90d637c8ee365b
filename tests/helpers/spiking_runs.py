"""Runs the trainer on the ranks of a layout while the loss of some steps is spoiled on the last rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.trainer import Trainer
from helpers.parallel_runs import own


def train(
    path: Path,
    overrides: list[str],
    factors: Mapping[int, float],
    resume: str | None = None,
    deepspeed: Path | None = None,
    runs_ahead: bool = False,
) -> tuple[int, int, int]:
    """Trains, with the total loss of each step in `factors` multiplied on the last rank.

    Returns the last step, the skipped steps and the updates of the optimizer. With `runs_ahead` the host reads each
    step after the launch of the next one, as with a GPU.
    """
    config = load_config(path, overrides)
    settings = DeepSpeedFile(deepspeed) if deepspeed else None
    if settings is not None:
        config = settings.resolve_layout(config, dist.get_world_size())
    mesh = build_mesh(config.parallel, "cpu")
    trainer = Trainer(config, own("cpu"), resume, mesh, deepspeed=settings)
    if mesh.rank == mesh.size - 1:
        _spoil(trainer.engine, factors)
    trainer._runs_ahead = runs_ahead
    result = trainer.run()
    return result.step, trainer.anomalies.total, trainer.engine.optimizer.num_steps


def _spoil(engine: Engine, factors: Mapping[int, float]) -> None:
    backward = engine._backward

    def spoiled(batches: Any, step: ScheduledStep) -> Any:
        losses = backward(batches, step)
        return losses._replace(total=losses.total * factors.get(step.number, 1.0))

    engine._backward = spoiled  # type: ignore[method-assign]

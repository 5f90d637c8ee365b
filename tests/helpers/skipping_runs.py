"""Trains steps whose loss or gradient is not finite or too large on one rank, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_v3.training.optimizer import StepLimits, local
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.utils.checkpointing.state_dict import flatten
from helpers import deepspeed_runs, parallel_runs

# What happens in each step of a run, on its last rank alone.
STORY = ("", "gradient nan", "gradient inf", "loss nan", "gradient 100", "loss 1000", "")
LIMITS = StepLimits(loss=50.0, norm=50.0)


def train(parallel: dict[str, Any], layers: int, story: tuple[str, ...] = STORY) -> list[Any]:
    """Trains on the ranks of a layout; returns the rows of `_run_story`."""
    model = {"num_hidden_layers": layers}
    config = parallel_runs.run_config(len(STORY), {"precision": "fp32", **parallel}, {}, model)
    return _run_story(parallel_runs.engine_of(config), config, story)


def train_by_deepspeed(file: Path, layers: int) -> list[Any]:
    """Trains with DeepSpeed; returns the rows of `_run_story`."""
    model = {"num_hidden_layers": layers}
    return _run_story(*deepspeed_runs.engine_of(file, len(STORY), {"micro_batch_size": 4}, {}, model), STORY)


def _run_story(engine: Engine, config: Any, story: tuple[str, ...]) -> list[Any]:
    """Runs the steps of a story except those that are "left out"; returns one row for each step.

    A row holds whether the step was finite, whether it left every bit of the state unchanged, how many updates the
    optimizer has made, the loss and the gradient norm.
    """
    trouble = _Trouble(engine)
    plan, rows = TrainingSchedule(config), []
    before = _state(engine)
    for number, what in enumerate(story, start=1):
        if what == "left out":
            continue
        trouble.now = what
        step = plan.step(number)
        result = engine.run_step(parallel_runs.micro_batches_of(engine, config, step), step, LIMITS)
        after = _state(engine)
        same = all(tensor.equal(before[name]) for name, tensor in after.items())
        figures = (result.losses.total.item(), result.norm.item())
        rows.append((bool(result.accepted), same, engine.optimizer.num_steps, *figures))
        before = after
    return rows


def _state(engine: Engine) -> dict[str, Tensor]:
    return {name: local(tensor).detach().clone() for name, tensor in flatten(engine.state())[0].items()}


class _Trouble:
    """On the last rank, spoils the gradient of its first attention, or only its loss, as `now` says."""

    def __init__(self, engine: Engine) -> None:
        self.now = ""
        if engine.mesh.rank != engine.mesh.size - 1:
            return
        layers = (layer for layer in engine.models[0].model.layers if not isinstance(layer, nn.Identity))
        next(layers).self_attn.register_forward_hook(self._hook)
        backward = engine._backward

        def with_loss(batches: Any, step: ScheduledStep) -> Any:
            losses = backward(batches, step)
            if not self.now.startswith("loss"):
                return losses
            return losses._replace(total=losses.total + float(self.now.removeprefix("loss ")))

        engine._backward = with_loss  # type: ignore[method-assign]

    def _hook(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.now.startswith("gradient") and output.requires_grad:
            value = float(self.now.removeprefix("gradient "))
            output.register_hook(lambda gradient: torch.full_like(gradient, value))

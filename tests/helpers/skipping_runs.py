"""Steps whose loss or gradient is not finite on one rank, on the ranks of any layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_v3.training.optimizer import local
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.utils.checkpointing.state_dict import flatten
from helpers import deepspeed_runs, parallel_runs

# What happens in each step of a run, on its last rank alone.
STORY = ("", "gradient nan", "gradient inf", "loss nan", "")


def train(parallel: dict[str, Any], story: tuple[str, ...] = STORY) -> list[Any]:
    """What `_told` returns of a run on the ranks of a layout."""
    config = parallel_runs.run_config(len(STORY), {"precision": "float32", **parallel}, {})
    return _told(parallel_runs.engine_of(config), config, story)


def train_by_deepspeed(file: Path) -> list[Any]:
    """The same, by DeepSpeed."""
    return _told(*deepspeed_runs.engine_of(file, len(STORY), {"micro_batch_size": 4}, {}), STORY)


def _told(engine: Engine, config: Any, story: tuple[str, ...]) -> list[Any]:
    """Of every step: whether it was finite, whether it left all state as it was to the bit, the steps taken, its
    loss and its norm. Steps whose story is "left out" are not taken."""
    trouble = _Trouble(engine)
    plan, found = TrainingSchedule(config), []
    for number, what in enumerate(story, start=1):
        if what == "left out":
            continue
        before = _state(engine)
        trouble.now = what
        step = plan.step(number)
        result = engine.run_step(parallel_runs.micro_batches_of(engine, config, step), step)
        after = _state(engine)
        same = all(tensor.equal(before[name]) for name, tensor in after.items())
        figures = (result.losses.total.item(), result.norm.item())
        found.append((bool(result.finite), same, engine.optimizer.num_steps, *figures))
    return found


def _state(engine: Engine) -> dict[str, Tensor]:
    return {name: local(tensor).detach().clone() for name, tensor in flatten(engine.state())[0].items()}


class _Trouble:
    """On the last rank, spoils the gradient behind its first attention, or its loss alone, as `now` says."""

    def __init__(self, engine: Engine) -> None:
        self.now = ""
        if engine.mesh.rank != engine.mesh.size - 1:
            return
        layers = (layer for layer in engine.models[0].model.layers if not isinstance(layer, nn.Identity))
        next(layers).self_attn.register_forward_hook(self._hook)
        backward = engine._backward

        def with_loss(batches: Any, step: ScheduledStep) -> Any:
            losses = backward(batches, step)
            return losses._replace(total=losses.total * math.nan) if self.now == "loss nan" else losses

        engine._backward = with_loss  # type: ignore[method-assign]

    def _hook(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self.now.startswith("gradient") and output.requires_grad:
            value = float(self.now.removeprefix("gradient "))
            output.register_hook(lambda gradient: torch.full_like(gradient, value))

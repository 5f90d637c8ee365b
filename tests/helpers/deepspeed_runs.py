"""Trains with DeepSpeed on the ranks of a pool and returns everything that must equal a run in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.parallel.build import build_engine
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.distributed.launch import World, export_environment
from deepseek_v3.utils.errors import ConfigError
from helpers import parallel_runs

CPU = torch.device("cpu")


def write_settings(folder: Path, settings: dict[str, Any]) -> Path:
    """Writes a DeepSpeed JSON file to `folder`."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def train(
    file: Path,
    steps: int,
    parallel: dict[str, Any],
    training: dict[str, Any],
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """As `parallel_runs.train`, with whole gradients and weights instead of shards."""
    engine, config = engine_of(file, steps, parallel, training, model)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    parameters = dict(engine.models[0].named_parameters())
    gradients: dict[str, Any] = {}
    take_step = engine._engine.step

    def keeping() -> None:
        if not gradients and engine._engine.is_gradient_accumulation_boundary():
            gradients.update({n: safe_get_full_grad(p).numpy().copy() for n, p in parameters.items()})
        take_step()

    engine._engine.step = keeping
    rows = parallel_runs.take_steps(engine, config)
    weights = {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in parameters.items()}
    held_out = engine.evaluate([parallel_runs.batches_of(config, 99)[:1]]).losses_G.numpy()
    return {"rows": rows, "gradients": gradients, "weights": weights, "held_out": held_out}


def routings(file: Path) -> dict[tuple[str, int], Any]:
    """As `parallel_runs.routings`, with DeepSpeed."""
    engine, config = engine_of(file, 1, {"precision": "bf16"}, {})
    for name, parameter in engine.models[0].named_parameters():
        engine._set_weight(parameter, parallel_runs.noise(name, parameter.shape))
    return parallel_runs.routings_of(engine, config)


def engine_of(
    file: Path,
    steps: int,
    parallel: dict[str, Any],
    training: dict[str, Any],
    model: dict[str, Any] | None = None,
) -> tuple[Engine, RunConfig]:
    """DeepSpeed's engine for a run, and the run's config with its layout resolved."""
    _announce()
    settings = DeepSpeedFile(file)
    config = parallel_runs.run_config(steps, parallel, training, model)
    config = settings.resolve_layout(config, dist.get_world_size())
    return build_engine(config, build_mesh(config.parallel, "cpu"), CPU, lambda _: None, settings), config


def train_run(file: Path, path: Path, overrides: list[str], resume: str | None) -> tuple[int, float]:
    """Runs the trainer as the command does; returns the last step and the validation loss."""
    _announce()
    settings = DeepSpeedFile(file)
    config = settings.resolve_layout(load_config(path, overrides), dist.get_world_size())
    result = Trainer(config, CPU, resume, build_mesh(config.parallel, "cpu"), deepspeed=settings).run()
    assert result.validation is not None
    return result.step, result.validation.loss


def measured(file: Path, path: Path, overrides: list[str]) -> parallel_runs.Measured:
    """As `parallel_runs.measured`, with DeepSpeed."""
    _announce()
    settings = DeepSpeedFile(file)
    config = settings.resolve_layout(load_config(path, overrides), dist.get_world_size())
    trainer = Trainer(config, CPU, mesh=build_mesh(config.parallel, "cpu"), deepspeed=settings)
    for name, parameter in trainer.engine.models[0].named_parameters():
        values = parallel_runs.frequent_words(name, getattr(parameter, "ds_shape", parameter.shape))
        trainer.engine._set_weight(parameter, values)
    return parallel_runs.validate(trainer)


def started(file: Path, path: Path, overrides: list[str], init: Path) -> dict[str, Any]:
    """Starts a run from weights; returns the whole weights and moments on every rank, as a checkpoint has them."""
    _announce()
    settings = DeepSpeedFile(file)
    config = settings.resolve_layout(load_config(path, overrides), dist.get_world_size())
    engine = Trainer(config, CPU, mesh=build_mesh(config.parallel, "cpu"), deepspeed=settings, init=init).engine
    state = flatten(engine.state())[0]
    return {
        name: (engine._gathered(tensor, CPU) if isinstance(tensor, DTensor) else tensor).numpy()
        for name, tensor in state.items()
    }


def refusal(file: Path) -> str:
    """The error of a run with settings that DeepSpeed does not accept."""
    try:
        engine_of(file, 1, {"micro_batch_size": 4}, {})
    except ConfigError as error:
        return str(error)
    return "no error"


def _announce() -> None:
    sys.modules["mlflow"] = None  # DeepSpeed would import it for its tuner, which takes a second
    rank, size = dist.get_rank(), dist.get_world_size()
    export_environment(World(rank, size, rank, size), CPU)

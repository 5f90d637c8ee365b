"""Trains a few steps on the ranks of a layout and returns everything that must not depend on the layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.moe.routing import Router, Routing
from deepseek_v3.training.data import document_ids
from deepseek_v3.training.optimizer import MOMENTS, StepLimits, local
from deepseek_v3.training.parallel.build import build_engine
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.parallel.sharding import local_shards
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.errors import DataError
from helpers.runs import SEQUENCE_LENGTH, run_fields

SEQUENCES = 8


def run_config(
    steps: int, parallel: dict[str, Any], training: dict[str, Any], model: dict[str, Any] | None = None
) -> RunConfig:
    """A run whose batch gives each of four ranks two sequences."""
    fields = run_fields(Path("run"))
    fields["model"] |= {"num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
    fields["model"] |= model or {}
    fields["training"] |= {
        "total_tokens": steps * SEQUENCES * SEQUENCE_LENGTH,
        "global_batch_size": SEQUENCES,
        "balance": {"sequence_loss_weight": 0.01, "bias_update_speed": 0.01},
        **training,
    }
    fields["training"]["optimizer"] = {"learning_rate": 1e-3, "moments": "float32"}
    fields["parallel"] = {"micro_batch_size": 1, **parallel}
    return RunConfig.model_validate(fields, strict=False)


def batches_of(config: RunConfig, number: int) -> Tensor:
    """The sequences of step `number`, int64 (sequences, length + 1); they depend on nothing else."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, config.model.vocab_size, (SEQUENCES, SEQUENCE_LENGTH + 1), generator=generator)


def train(
    steps: int,
    parallel: dict[str, Any],
    training: dict[str, Any] | None = None,
    device: str = "cpu",
    masked: bool = False,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains; returns the losses, norms, loads and biases of every step, and this rank's shards.

    The shards are of the gradients of the first step and of the weights after the last. With `masked`, attention
    does not cross documents, and the sequences have different numbers of documents.
    """
    config = run_config(steps, {"precision": "fp32", **parallel}, training or {}, model)
    engine = engine_of(config, device, _documents if masked else _no_documents)
    first: dict[str, Any] = {}
    _keep_gradients(engine, first)
    rows = take_steps(engine, config)
    weights = _blocks(engine, lambda parameter: parameter)
    held_out = engine.evaluate([batches_of(config, 99)[:1].to(own(device))]).losses_G.cpu().numpy()
    return {"rows": rows, "gradients": first, "weights": weights, "held_out": held_out}


def engine_of(config: RunConfig, device: str = "cpu", documents: Any = None) -> Engine:
    """The engine of a run on the ranks of its layout; each sequence is one document unless `documents` is given."""
    return build_engine(config, build_mesh(config.parallel, device), own(device), documents or _no_documents)


def own(device: str) -> torch.device:
    """This rank's device: the CPU, or the GPU with the number of the rank."""
    return torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)


def layer_runs(parallel: dict[str, Any]) -> int:
    """The number of forward passes of layers in one step on this rank, recomputed ones included."""
    config, runs = run_config(1, {"precision": "fp32", **parallel}, {}), []
    engine = build_engine(config, build_mesh(config.parallel, "cpu"), own("cpu"), _no_documents)
    for model in engine.models:
        for layer in model.model.layers:
            if isinstance(layer, DecoderLayer):
                layer.register_forward_pre_hook(lambda *_: runs.append(1))
    take_steps(engine, config)
    return len(runs)


def take_steps(engine: Engine, config: RunConfig) -> list[Any]:
    """Trains to the end; returns the losses and norm, the loads and the biases of every step."""
    rows = []
    plan = TrainingSchedule(config)
    for number in range(1, plan.total_steps + 1):
        step = plan.step(number)
        whole, norm, _ = engine.run_step(micro_batches_of(engine, config, step), step)
        figures = [whole.total, whole.main, whole.mtp, whole.balance, norm]
        rows.append(
            (
                np.array([float(f) for f in figures]),
                whole.counts_LE.cpu().numpy(),
                engine.routing_biases().cpu().numpy(),
            )
        )
    return rows


def routings(parallel: dict[str, Any]) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """`routings_of` the engine of a layout in bfloat16 with random weights."""
    config = run_config(1, {"precision": "bf16", **parallel}, {})
    engine = engine_of(config)
    for part in engine.models:
        for name, piece in local_shards(part, engine.mesh).items():
            local(part.get_parameter(name)).detach().copy_(piece.of(noise(name, piece.shape)))
    return routings_of(engine, config)


def noise(name: str, shape: Sequence[int]) -> Tensor:
    """Random values for a parameter, not representable in bfloat16; they depend on its name and shape only."""
    values = 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)))
    return 1 + values if name.endswith("norm.weight") else values


class Measured(NamedTuple):
    """A validation: the loss, and the share of accepted drafts at each depth."""

    loss: float
    mtp_acceptance: tuple[float, ...]


def measured(path: Path, overrides: list[str], device: str = "cpu") -> Measured:
    """Validates a model with the weights of `frequent_words` on the hold-out split of a run."""
    config = load_config(path, overrides)
    trainer = Trainer(config, own(device), mesh=build_mesh(config.parallel, device))
    for part in trainer.engine.models:
        for name, piece in local_shards(part, trainer.mesh).items():
            local(part.get_parameter(name)).detach().copy_(piece.of(frequent_words(name, piece.shape)))
    return validate(trainer, device)


def validate(trainer: Trainer, device: str = "cpu") -> Measured:
    """Validates the model of a trainer; the loss must be the same if drafts are not counted."""
    sums = own(device), trainer.mesh.sum_over_ranks
    alone = trainer.validator.measure(trainer.engine.evaluate, *sums)
    found = trainer.validator.measure(partial(trainer.engine.evaluate, with_drafts=True), *sums)
    assert (found.loss, alone.mtp_acceptance) == (alone.loss, ())
    return Measured(found.loss, found.mtp_acceptance)


def frequent_words(name: str, shape: Sequence[int]) -> Tensor:
    """The values of `noise`, with a head that prefers few tokens, so that many drafts are accepted."""
    values = noise(name, shape)
    if name == "lm_head.weight":
        values[4:] *= 0.1
    return values


def routings_of(engine: Engine, config: RunConfig) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """The experts and gates of every token in one step, by name of the router and number of the sequence."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for part in engine.models:
        for name, module in part.named_modules():
            if isinstance(module, Router):
                kept = found.setdefault(name, [])
                module.register_forward_hook(lambda _, __, routing, kept=kept: kept.append(_as_arrays(routing)))
    step = TrainingSchedule(config).step(1)
    samples = TrainingSchedule(config).micro_batches(
        step, 1, engine.mesh.data_rank, engine.mesh.parallel.data_ranks
    )
    tokens = batches_of(config, 1)
    engine.run_step(iter([tokens[first:][:size] for first, size in samples]), step)
    return {
        (name, first): routing
        for name, kept in found.items()
        for (first, _), routing in zip(samples, kept, strict=True)
    }


def _as_arrays(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    return routing.experts_TK.numpy(), routing.gates_TK.detach().numpy()


def micro_batches_of(engine: Engine, config: RunConfig, step: ScheduledStep) -> Iterator[Tensor]:
    """This rank's micro-batches of a step."""
    parallel, ranks = config.parallel, engine.mesh
    micro = TrainingSchedule(config).micro_batches(
        step, parallel.micro_batch_size, ranks.data_rank, parallel.data_ranks
    )
    tokens = batches_of(config, step.number).to(engine.routing_biases().device)
    return iter([tokens[start - step.first_sample :][:size] for start, size in micro])


def whole(results: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """Assembles whole tensors from the shards of all ranks; fails if an element is on no rank."""
    tensors: dict[str, np.ndarray] = {}
    for result in results:
        for name, (shape, starts, values) in result[what].items():
            tensor = tensors.setdefault(name, np.full(shape, np.nan, values.dtype))
            tensor[tuple(slice(s, s + n) for s, n in zip(starts, values.shape, strict=True))] = values
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


def _no_documents(tokens_BX: Tensor) -> None:
    return None


def _documents(tokens_BX: Tensor) -> Tensor:
    return document_ids(tokens_BX % 5, end_of_text=0)


def _keep_gradients(engine: Engine, kept: dict[str, Any]) -> None:
    step = engine.optimizer.step

    def keeping(learning_rate: float, loss: Tensor, limits: StepLimits) -> Tensor:
        if not kept:
            kept.update(_blocks(engine, lambda parameter: parameter.grad))
        return step(learning_rate, loss, limits)

    engine.optimizer.step = keeping


def _blocks(engine: Engine, tensor_of: Any) -> dict[str, Any]:
    blocks = {}
    for model in engine.models:
        for name, piece in local_shards(model, engine.mesh).items():
            values = local(tensor_of(model.get_parameter(name))).detach().cpu().numpy().copy()
            if name in blocks:  # this rank has the parameter twice
                np.testing.assert_array_equal(blocks[name][2], values, err_msg=name)
            blocks[name] = (piece.shape, piece.starts, values)
    return blocks


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank()


def train_until_tokens_are_lost(path: Path, overrides: list[str], split: str, rank: int) -> tuple[int, str]:
    """Trains while the token shards of `rank` become unreadable in step 3; returns the last step and the error."""
    config = load_config(path, overrides)
    loses = dist.get_rank() == rank

    def lose(step: int) -> None:
        if step == 3 and loses:
            copy = Path(f"{config.data.path} of rank {rank}")
            shutil.copytree(config.data.path, copy)
            trainer.tokens.directory = copy
            trainer.tokens._file.cache_clear()
            for name, number, _ in trainer.tokens._shards():
                trainer.tokens._file(name, number)
            for file in (copy / split).iterdir():
                os.truncate(file, 9)

    trainer = Trainer(config, own("cpu"), None, build_mesh(config.parallel, "cpu"), lose)
    try:
        trainer.run()
    except DataError as error:
        return trainer._steps_done, str(error)
    return trainer._steps_done, "nothing was lost"


def train_run(path: Path, overrides: list[str], resume: str | None, device: str = "cpu") -> tuple[int, float]:
    """Runs the trainer as the command does; returns the last step and the validation loss."""
    config = load_config(path, overrides)
    trainer = Trainer(config, own(device), resume, build_mesh(config.parallel, device))
    result = trainer.run()
    assert result.validation is not None
    return result.step, result.validation.loss


class Resumed(NamedTuple):
    """What a rank holds after resuming: kinds of tensors compared, tensors that differ, validation loss."""

    compared: set[str]
    differing: list[str]
    validation: float


def resumed(path: Path, overrides: list[str], checkpoint: str, device: str = "cpu") -> Resumed:
    """Resumes a run and compares every weight and moment on this rank, in all copies, with the checkpoint."""
    config = load_config(path, overrides)
    trainer = Trainer(config, own(device), checkpoint, build_mesh(config.parallel, device))
    engine, saved = trainer.engine, load_checkpoint(Path(checkpoint))
    wholes = {"model": saved["model"], **{kind: saved["optimizer"][kind] for kind in MOMENTS}}
    compared, differing = set(), []
    for model in engine.models:
        for name, piece in local_shards(model, engine.mesh).items():
            parameter = model.get_parameter(name)
            for kind, values in {"model": parameter, **engine.optimizer.state[parameter]}.items():
                compared.add(kind)
                if not local(values).cpu().equal(piece.of(wholes[kind][name])):
                    differing.append(f"{kind} of {name}")
    measured = trainer.validator.measure(engine.evaluate, own(device), engine.mesh.sum_over_ranks)
    return Resumed(compared, differing, measured.loss)


def started(path: Path, overrides: list[str], init: Path, device: str = "cpu") -> tuple[int, list[str]]:
    """Starts a run from weights; returns how many tensors were compared and which differ on this rank.

    Weights and routing biases are compared with those of the checkpoint beside `init`, moments with zeros.
    """
    config = load_config(path, overrides)
    trainer = Trainer(config, own(device), mesh=build_mesh(config.parallel, device), init=init)
    return compared_with(trainer.engine, load_checkpoint(init.parent / "weights.pt")["model"])


def compared_with(engine: Engine, weights: dict[str, Tensor]) -> tuple[int, list[str]]:
    assert engine.optimizer.num_steps == 0
    count, differing = 0, []
    for model in engine.models:
        expected = {name: piece.of(weights[name]) for name, piece in local_shards(model, engine.mesh).items()}
        expected |= {name: weights[name] for name, _ in model.named_buffers()}
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        differing += [name for name, values in found.items() if not local(values).cpu().equal(expected[name])]
        count += len(found)
        for name, parameter in model.named_parameters():
            moments = engine.optimizer.state[parameter].values()
            differing += [f"moments of {name}" for values in moments if local(values).count_nonzero()]
    return count, differing

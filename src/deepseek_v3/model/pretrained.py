"""A model as a checkpoint holds it: weights, the config of its run, and its tokenizer, in one file or folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.backends import compute_dtype, select_backends
from deepseek_v3.model.saved_entries import ModelEntries, check_entries
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.checkpointing.checks import (
    mismatches,
    non_finite,
    non_finite_summary,
    raise_problems,
    tensor_infos,
    unexpected_tensors,
)
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, is_checkpoint, load_checkpoint
from deepseek_v3.utils.checkpointing.errors import REPAIR
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.text import format_value

# 2: the optimizer's moments by parameter name; 1: in the order of its parameters.
FORMAT = 2


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with the config of its run, the text of its tokenizer.json, and how far it trained."""

    model: DeepSeekV3
    config: RunConfig
    tokenizer_json: str
    step: int
    tokens: int


def model_entries(model: DeepSeekV3, config: RunConfig, tokenizer_json: str) -> dict[str, Any]:
    """The entries of a checkpoint that `load_model` reads; a trainer adds its own."""
    return {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "model": model.state_dict(),
        "tokenizer": tokenizer_json,
    }


def checkpoint_config(state: dict[str, Any], path: Path) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError where it is of a later format."""
    if type(state.get("format")) is not int or state["format"] not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path}: has checkpoint format {format_value(state.get('format'))}, "
            f"this version reads up to {FORMAT}; load it with the version of the program that wrote it"
        )
    if not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path}: has no entry 'config' of sections and their fields; {REPAIR}")
    return config_from_dict(state["config"], str(path))


def moments_by_name(optimizer: dict[str, Any], model: dict[str, Tensor]) -> dict[str, Any]:
    """The optimizer's entry of a checkpoint of format 1 as one of format 2; one of format 2 as it is.

    Format 1 has `{"num_steps", "moments": [{"exp_avg", "exp_avg_sq"}, …]}`, first those of matrices, then those of
    vectors, either in the order of `model`, the checkpoint's weights, whose routing biases have no moments.
    Format 2 has `{"num_steps", "exp_avg": {name: tensor}, "exp_avg_sq": {name: tensor}}`.
    Raises CheckpointError for moments that are not those of the weights.
    """
    if "moments" not in optimizer:
        return optimizer
    trained = [name for name in model if not name.endswith("e_score_correction_bias")]
    names = sorted(trained, key=lambda name: model[name].ndim < 2)
    moments, kinds = optimizer["moments"], {"exp_avg", "exp_avg_sq"}
    fit = isinstance(moments, list) and all(isinstance(entry, dict) and entry.keys() == kinds for entry in moments)
    if not fit or len(moments) != len(names):
        raise CheckpointError(f"optimizer.moments: expected {' and '.join(sorted(kinds))} of {len(names)} weights")
    rest = {name: value for name, value in optimizer.items() if name != "moments"}
    by_kind = {kind: {name: entry[kind] for name, entry in zip(names, moments, strict=True)} for kind in kinds}
    return {**rest, **by_kind}


def split_entries(state: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a loaded checkpoint, of any format, by dotted name, and its plain entries beside them.

    Raises CheckpointError for entries that no checkpoint of this project has.
    """
    try:
        optimizer, model = state.get("optimizer"), state.get("model")
        if isinstance(optimizer, dict) and isinstance(model, dict):
            weights = {name: value for name, value in model.items() if isinstance(value, Tensor)}
            state = {**state, "optimizer": moments_by_name(optimizer, weights)}
        return flatten(state)
    except (TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}; {REPAIR}") from None


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """Rebuilds the model of a checkpoint on `device`, computing in the format that suits it.

    `path` is a checkpoint, or a folder of them: the newest that is undamaged, each passed over logged as a warning.
    Raises CheckpointError where it is damaged, lacks anything, holds weights that are not finite, or is not a
    checkpoint of this project.
    """
    if is_checkpoint(path):
        return _load_model(path, device)
    checkpoints = CheckpointDirectory(path, keep=1)
    return checkpoints.first_usable(checkpoints.newest_first(), partial(_load_model, device=device))[1]


def _load_model(path: Path, device: torch.device) -> LoadedModel:
    state = load_checkpoint(path)
    config = checkpoint_config(state, path)
    tensors, plain = split_entries(state, path)
    check_entries(ModelEntries, plain, path)
    if bad := non_finite(state["model"]):
        raise CheckpointError(
            f"{path}: {non_finite_summary(bad)}; its training had diverged, so use an earlier checkpoint"
        )
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    expected = tensor_infos({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    found = tensor_infos({name: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    raise_problems(
        path, [*mismatches(found, expected), *unexpected_tensors(sorted(found.keys() - expected.keys()))], REPAIR
    )
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()}, assign=True)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    select_backends(model, device)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, config, plain["tokenizer"], plain["step"], plain["tokens"])

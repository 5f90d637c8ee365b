"""The model part of a checkpoint: its entries, the checks on reading it, and loading a model that can run.

A checkpoint of format 2 is a nested dict, saved as one file or as a folder of shards:

    format, config            int; the sections of the run's config
    model                     {name: tensor}, float32 weights and routing biases under the released names
    tokenizer                 str, the text of tokenizer.json
    end_of_text               ids of the tokens that end a text, the end-of-text marker first
    tokenizer_config          the fields of tokenizer_config.json, or None
    step, tokens              how far the run had trained
    optimizer, random, corpus, skipped_in_a_row, recent_steps
                              what a run needs to resume (see `training.checkpoint`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.config.parallel_config import Precision
from deepseek_v3.config.text_files import printable_path
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.model.backends import compute_dtype, free_bytes, select_backends
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.layers import Linear
from deepseek_v3.utils.checkpointing.checks import (
    mismatches,
    non_finite,
    non_finite_summary,
    raise_problems,
    tensor_infos,
    unexpected_tensors,
)
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, is_checkpoint
from deepseek_v3.utils.checkpointing.errors import REPAIR, validation_problems
from deepseek_v3.utils.checkpointing.reader import CheckpointReader, open_checkpoint
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_si, format_value

FORMAT = 2

_log = get_logger("Weights")


def _only_tensors(rest: dict[str, Any]) -> dict[str, Any]:
    if rest:
        raise ValueError(f"has {', '.join(map(repr, sorted(rest)))}, which should be tensors")
    return rest


_AVERAGES = "optimizer.ema."  # the prefix of the averaged weights

Natural = Annotated[int, Field(ge=0)]
# `flatten` takes the tensors out of a dict, so a dict of nothing but tensors has to be empty afterwards.
Tensors = Annotated[dict[str, Any], AfterValidator(_only_tensors)]


class Entries(BaseModel):
    """The plain values of a checkpoint, or of a part of it; unknown names and other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntries(Entries):
    """The entries that running the model needs. Other entries of a run may exist, and are not checked."""

    format: int
    config: dict[str, Any]
    model: Tensors
    tokenizer: str
    end_of_text: list[Natural] = Field(default_factory=list)  # by name in checkpoints of older versions
    tokenizer_config: dict[str, Any] | None = None
    step: Natural
    tokens: Natural
    optimizer: Any = None
    random: Any = None
    corpus: Any = None
    skipped_in_a_row: Natural = 0
    recent_steps: Any = None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, with its run's config, its tokenizer, and the run's progress."""

    model: DeepSeekV3
    config: RunConfig
    tokenizer: Tokenizer
    step: int
    tokens: int


def model_entries(weights: Mapping[str, Any], config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of a checkpoint that describe the model; the caller adds `step`, `tokens` and the optimizer."""
    return {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "model": weights,
        "tokenizer": tokenizer.to_json(),
        "end_of_text": list(tokenizer.ends),
        "tokenizer_config": None if tokenizer.config is None else dict(tokenizer.config),
    }


def checkpoint_tokenizer(plain: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, from its checked entries."""
    ends, fields = plain.get("end_of_text") or (), plain.get("tokenizer_config")
    return Tokenizer(plain["tokenizer"], f"{path}: its tokenizer", ends, fields)


def checkpoint_config(state: dict[str, Any], path: Path) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError for any format other than FORMAT."""
    found = state.get("format")
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {format_value(found)}, this version reads format {FORMAT} only; "
            "load it with the version of the program that wrote it"
        )
    if not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path}: has no entry 'config' of sections and their fields; {REPAIR}")
    return config_from_dict(state["config"], str(path))


def check_entries(kind: type[ModelEntries], plain: dict[str, Any], path: Path) -> None:
    """Raises one CheckpointError that lists every plain entry that is missing, unknown or of a wrong type."""
    try:
        kind.model_validate(plain)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {validation_problems(error)}; {REPAIR}") from None


def load_checkpoint_model(
    path: Path,
    device: torch.device,
    precision: Precision | None = None,
    mtp_layers: int = 0,
    *,
    averaged: bool = False,
) -> LoadedModel:
    """Rebuilds the model of a checkpoint on `device`, in evaluation mode, and reads no other tensors of the run.

    Without `precision` the weights are float32, as saved, and the model computes in the dtype of its run. With a
    precision it is ready for inference, with `mtp_layers`: see `prepare_for_inference`; `auto` follows the run's.
    `averaged` takes the averages of the weights, which the run must have kept; routing biases are not averaged.

    `path` is one checkpoint, or a folder of them: then the newest undamaged one is loaded, and each one skipped is
    logged as a warning. Raises CheckpointError if the checkpoint is damaged, incomplete, of another format, not of
    this project, holds weights that are not finite, or does not fit in the memory of the device.
    """
    if is_checkpoint(path):
        return _load(path, device, precision, mtp_layers, averaged)
    checkpoints = CheckpointDirectory(path, keep=1)
    load = partial(_load, device=device, precision=precision, mtp_layers=mtp_layers, averaged=averaged)
    return checkpoints.first_usable(checkpoints.newest_first(), load)[1]


def prepare_for_inference(model: DeepSeekV3, dtype: torch.dtype, mtp_layers: int = 0) -> None:
    """Lets a model, on the meta device, compute in `dtype` without casting a weight: to be called before loading.

    Matrices are stored in `dtype`. Norms and routers compute in float32 and stay in it, so the model computes the
    same numbers as one whose float32 weights are cast at every use. The first `mtp_layers` MTP layers,
    which draft tokens, stay; the others do not run and are removed. Raises ConfigError if the model has fewer.
    """
    found = model.config.num_nextn_predict_layers
    if found < mtp_layers:
        raise ConfigError(
            f"found {found} MTP layers in the model, expected {mtp_layers} to draft tokens; take weights that hold "
            "MTP layers (num_nextn_predict_layers = 1 or more), or generate without --speculate"
        )
    model.keep_mtp_layers(mtp_layers)
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding, RoutedExperts)):
            module.to(dtype)
    model.compute_dtype = dtype


def allocate_weights(model: DeepSeekV3, device: torch.device, source: str) -> dict[str, Tensor]:
    """Moves a model from the meta device to `device`, its values undefined; returns its state, by name.

    Logs the memory that it takes. Raises CheckpointError if that is more than is free.
    """
    needed, free = sum(tensor.nbytes for tensor in model.state_dict().values()), free_bytes(device)
    dtype = str(model.head_weight_VD.dtype).removeprefix("torch.")
    if needed > free:
        smaller = "" if dtype == "bfloat16" else ", or generate with --precision bf16, which takes half of it"
        raise CheckpointError(
            f"{source}: the weights take {format_si(needed, 'B')} in {dtype}, found {format_si(free, 'B')} free on "
            f"{device}; take a device with more memory{smaller}"
        )
    _log.info(f"{format_si(needed, 'B')} in {dtype}, of {format_si(free, 'B')} that are free on {device}")
    return model.to_empty(device=device).state_dict()


def _load(
    path: Path, device: torch.device, precision: Precision | None, mtp_layers: int, averaged: bool
) -> LoadedModel:
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    plain, config = checkpoint.plain, checkpoint_config(checkpoint.plain, path)
    check_entries(ModelEntries, plain, path)
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    _check_tensors(checkpoint, model)
    if averaged and not any(name.startswith(_AVERAGES) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{path}: holds no averages of its weights, which a run keeps with training.optimizer.ema_decay; leave "
            "out --ema, or average checkpoints with dsv3 checkpoint average"
        )
    chosen = config.parallel.precision if precision in (None, "auto") else precision
    model.compute_dtype = compute_dtype(chosen, device)
    if precision is not None:
        prepare_for_inference(model, model.compute_dtype, mtp_layers)
    state = allocate_weights(model, device, printable_path(path))
    for name, target in state.items():
        average = f"{_AVERAGES}{name}"
        checkpoint.read_into(target, average if averaged and average in checkpoint.tensors else f"model.{name}")
    if bad := non_finite(state):
        raise CheckpointError(
            f"{path}: {non_finite_summary(bad)}; its training had diverged, so use an earlier checkpoint"
        )
    select_backends(model, device)
    model.eval().requires_grad_(False)
    return LoadedModel(model, config, checkpoint_tokenizer(plain, path), plain["step"], plain["tokens"])


def _check_tensors(checkpoint: CheckpointReader, model: DeepSeekV3) -> None:
    """Raises CheckpointError unless a checkpoint has the model's tensors and no others of a model."""
    expected = tensor_infos({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    found = {name: info for name, info in checkpoint.tensors.items() if name.startswith("model.")}
    problems = [*mismatches(found, expected), *unexpected_tensors(sorted(found.keys() - expected.keys()))]
    raise_problems(checkpoint.path, problems, REPAIR)

"""A model as a checkpoint holds it: weights, the config of its run, and its tokenizer, in one file or folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.back_ends import choose_back_ends
from deepseek_v3.model.precision import compute_dtype
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.checkpointing import CheckpointDirectory, is_checkpoint, load_checkpoint
from deepseek_v3.utils.errors import CheckpointError

# 2: the optimizer's moments by parameter name; 1: in the order of its parameters.
FORMAT = 2


@dataclass(frozen=True)
class SavedModel:
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


def config_of(state: dict[str, Any], path: Path) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError where it is of a later format."""
    if state.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path}: has checkpoint format {state.get('format')!r}, this version reads up to {FORMAT}; "
            "load it with the version of the program that wrote it"
        )
    return config_from_dict(state["config"], str(path))


def moments_by_name(optimizer: dict[str, Any], model: dict[str, Tensor]) -> dict[str, Any]:
    """The optimizer's entry of a checkpoint of format 1 as one of format 2; one of format 2 as it is.

    Format 1 has `{"num_steps", "moments": [{"exp_avg", "exp_avg_sq"}, …]}`, first those of matrices, then those of
    vectors, either in the order of `model`, the checkpoint's weights, whose routing biases have no moments.
    Format 2 has `{"num_steps", "exp_avg": {name: tensor}, "exp_avg_sq": {name: tensor}}`.
    """
    if "moments" not in optimizer:
        return optimizer
    trained = [name for name in model if not name.endswith("e_score_correction_bias")]
    names = sorted(trained, key=lambda name: model[name].ndim < 2)
    moments = dict(zip(names, optimizer["moments"], strict=True))
    return {
        "num_steps": optimizer["num_steps"],
        **{kind: {name: moments[name][kind] for name in names} for kind in ("exp_avg", "exp_avg_sq")},
    }


def load_model(path: Path, device: torch.device) -> SavedModel:
    """Rebuilds the model of a checkpoint on `device`, computing in the format that suits it.

    `path` is a checkpoint, or a folder of them: the newest that is undamaged, each passed over logged as a warning.
    Raises CheckpointError where it is damaged or not a checkpoint of this project.
    """
    if is_checkpoint(path):
        state = load_checkpoint(path)
    else:
        path, state = CheckpointDirectory(path, keep=1).latest()
    config = config_of(state, path)
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    model.load_state_dict(state["model"], assign=True)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    choose_back_ends(model, device)
    model = model.to(device).eval().requires_grad_(False)
    return SavedModel(model, config, state["tokenizer"], state["step"], state["tokens"])

"""A model as a checkpoint holds it: weights, the config of its run, and its tokenizer, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.back_ends import choose_back_ends
from deepseek_v3.model.precision import compute_dtype
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.checkpointing import CheckpointDirectory, load_checkpoint
from deepseek_v3.utils.errors import CheckpointError

FORMAT = 1


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
    """The config of the run that wrote a checkpoint. Raises CheckpointError where it is of another format."""
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: has checkpoint format {state.get('format')!r}, this version reads {FORMAT}")
    return config_from_dict(state["config"], str(path))


def load_model(path: Path, device: torch.device) -> SavedModel:
    """Rebuilds the model of a checkpoint on `device`, computing in the format that suits it.

    Raises CheckpointError where the file is damaged or not a checkpoint of this project.
    """
    return _rebuilt(load_checkpoint(path), path, device)


def load_newest_model(folder: Path, device: torch.device) -> SavedModel:
    """The same from the newest undamaged checkpoint of a folder; each passed over is logged as a warning."""
    path, state = CheckpointDirectory(folder, keep=1).latest()
    return _rebuilt(state, path, device)


def _rebuilt(state: dict[str, Any], path: Path, device: torch.device) -> SavedModel:
    config = config_of(state, path)
    with torch.device("meta"):
        model = DeepSeekV3(config.model)
    model.load_state_dict(state["model"], assign=True)
    model.compute_dtype = compute_dtype(config.parallel.precision, device)
    choose_back_ends(model, device)
    model = model.to(device).eval().requires_grad_(False)
    return SavedModel(model, config, state["tokenizer"], state["step"], state["tokens"])

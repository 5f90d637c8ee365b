"""Loads a model that can run from either form: a checkpoint of this project or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_v3.config.data_config import DataConfig
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.optimizer_config import OptimizerConfig
from deepseek_v3.config.parallel_config import Precision
from deepseek_v3.config.text_files import printable_path
from deepseek_v3.config.train_config import (
    CheckpointConfig,
    LoggingConfig,
    RunConfig,
    TrainingConfig,
)
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface.pretrained_folder import (
    check_tokenizer,
    is_huggingface_folder,
    load_opened,
    open_pretrained,
)
from deepseek_v3.model.backends import compute_dtype
from deepseek_v3.model.pretrained import LoadedModel, load_checkpoint_model
from deepseek_v3.utils.checkpointing.directory import is_checkpoint
from deepseek_v3.utils.errors import CheckpointError, ConfigError

_LONGEST_SEQUENCE = 4096  # as in the pre-training of the report; a longer context was reached by extension
_LEARNING_RATE = 7.3e-6  # the report's last phase


def load_model(path: Path, device: torch.device, *, averaged: bool = False) -> LoadedModel:
    """Loads a model on `device`, in evaluation mode, with the compute dtype that suits the device.

    `path` is a checkpoint, a folder of checkpoints, of which the newest undamaged one is loaded, or a Hugging Face
    directory. A model from such a directory has the config of `run_config`, and no steps. `averaged` takes the
    averages of the weights that a checkpoint holds.

    Raises CheckpointError, ConfigError and DataError as `load_checkpoint_model`, `open_pretrained` and
    `read_tokenizer` do.
    """
    return _load(path, device, None, 0, averaged)


def load_for_inference(
    path: Path,
    device: torch.device,
    precision: Precision = "auto",
    mtp_layers: int = 0,
    *,
    averaged: bool = False,
) -> LoadedModel:
    """Loads a model as `load_model` does, with weights that are stored as the model computes.

    Of the MTP layers it loads the first `mtp_layers`; the first one drafts tokens. A model with fewer is refused
    with a ConfigError.

    `auto` computes as the run of a checkpoint did, and otherwise as suits the device. Raises as `load_model`.
    """
    return _load(path, device, precision, mtp_layers, averaged)


def _load(
    path: Path, device: torch.device, precision: Precision | None, mtp_layers: int, averaged: bool
) -> LoadedModel:
    if not is_released(path):
        return load_checkpoint_model(path, device, precision, mtp_layers, averaged=averaged)
    if averaged:
        raise CheckpointError(
            f"{printable_path(path)}: a Hugging Face directory holds no averages of its weights, expected a "
            "checkpoint of this project; leave out --ema"
        )
    weights = open_pretrained(path)
    tokenizer, config = read_tokenizer(path, weights.config), run_config(weights.config)
    dtype = compute_dtype(precision or "auto", device)
    model = load_opened(weights, dtype, device, for_inference=precision is not None, mtp_layers=mtp_layers)
    return LoadedModel(model.requires_grad_(False), config, tokenizer, step=0, tokens=0)


def is_released(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory, rather than a checkpoint or a folder of checkpoints."""
    return is_huggingface_folder(path) and not is_checkpoint(path)


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises CheckpointError if it is not there, or has too many ids."""
    if not (directory / "tokenizer.json").exists():
        raise CheckpointError(
            f"{printable_path(directory)}: has no tokenizer.json, which turns text into ids; save the tokenizer "
            "there with Transformers' save_pretrained first"
        )
    tokenizer = Tokenizer.load(directory)
    check_tokenizer(tokenizer, config, printable_path(directory))
    return tokenizer


def run_config(model: ModelConfig) -> RunConfig:
    """A run of a model whose own run is not known: sequences of its context, at most 4,096 tokens long.

    Raises ConfigError if the context is too short to predict a token at every depth.
    """
    shortest = max(2, model.num_nextn_predict_layers + 1)
    if model.max_position_embeddings < shortest:
        raise ConfigError(
            f"config.json: max_position_embeddings = {model.max_position_embeddings}, expected at least {shortest} "
            f"to predict tokens with num_nextn_predict_layers = {model.num_nextn_predict_layers}; correct the file"
        )
    return RunConfig(
        model=model,
        training=TrainingConfig(
            total_tokens="1x",
            sequence_length=min(model.max_position_embeddings, _LONGEST_SEQUENCE),
            global_batch_size=1,
            optimizer=OptimizerConfig(learning_rate=_LEARNING_RATE),
        ),
        data=DataConfig(path=Path("data/continued")),
        checkpoint=CheckpointConfig(directory=Path("checkpoints/continued")),
        logging=LoggingConfig(directory=Path("runs/continued")),
    )

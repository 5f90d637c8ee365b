"""The command `dsv3 import`: turns a Hugging Face directory into a checkpoint of this project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from deepseek_v3.config.loading import config_to_yaml
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface.import_weights import ReleasedWeights
from deepseek_v3.interop.huggingface.pretrained_folder import new_folder, open_pretrained, refuse_existing
from deepseek_v3.interop.load_model import read_tokenizer, run_config
from deepseek_v3.model.pretrained import model_entries
from deepseek_v3.utils.checkpointing.checks import non_finite
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.checkpointing.stream_writer import Block, CheckpointStream
from deepseek_v3.utils.command_line import print_next_steps
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import write_synced
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.progress import ProgressDisplay

CONFIG_FILE = "config.yaml"
_BLOCK_BYTES = 2**30

_log = get_logger("Weights")


def import_model(
    directory: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A model in Hugging Face's format.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint to write; it must not exist yet.")],
    require_mtp: Annotated[
        bool, typer.Option("--require-mtp", help="Refuse weights without the MTP layers that their config states.")
    ] = False,
) -> None:
    """Turn a Hugging Face directory into a checkpoint."""
    configure_logging()
    config = import_checkpoint(directory, output, require_mtp=require_mtp)
    get_logger("Weights").info(
        f"{output}: a checkpoint of {config.model.num_hidden_layers} layers and "
        f"{config.model.num_nextn_predict_layers} MTP layers, with {output / CONFIG_FILE} to train it further"
    )
    print_next_steps(
        ["dsv3", "generate", "--checkpoint", output, "--prompt", "The"],
        ["dsv3", "tokenize", "--input", "FOLDER", "--tokenizer", directory, "--output", config.data.path],
        ["dsv3", "train", "--config", output / CONFIG_FILE, "--init", output],
    )


def import_checkpoint(directory: Path, output: Path, *, require_mtp: bool = False) -> RunConfig:
    """Writes the model and the tokenizer of a Hugging Face directory as a checkpoint folder without an optimizer.

    Weights become float32, as in every checkpoint. They are read and written in blocks of up to 1 GiB, and memory
    holds one file of about 4 GB. The folder also gets a `config.yaml`, with which `dsv3 train --init` continues. It
    appears complete or not at all. Returns that config.

    Raises CheckpointError if `output` exists or cannot be written, and if the directory cannot be used.
    """
    refuse_existing(output)  # before files of many GB are looked at
    weights = open_pretrained(directory, require_mtp=require_mtp)
    tokenizer, config = read_tokenizer(directory, weights.config), run_config(weights.config)
    with new_folder(output) as partial:
        write_synced(partial / CONFIG_FILE, config_to_yaml(config))
        CheckpointStream(partial).write(_blocks(weights), _plain(config, tokenizer))
    return config


def _plain(config: RunConfig, tokenizer: Tokenizer) -> dict[str, object]:
    return flatten({**model_entries({}, config, tokenizer), "step": 0, "tokens": 0})[1]


def _blocks(weights: ReleasedWeights) -> Iterator[Block]:
    """The weights in float32, block by block, by their names in a checkpoint; large ones are cut along their rows.

    Raises CheckpointError if one is not finite.
    """
    total = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    with ProgressDisplay() as display, display.task("Importing", total, "parameters", _log) as task:
        for name, shape in weights.shapes.items():
            row_bytes = 4 * torch.Size(shape[1:]).numel()
            step = max(1, _BLOCK_BYTES // row_bytes)
            for first in range(0, shape[0], step):
                starts = (first, *(0 for _ in shape[1:]))
                values = torch.empty(min(step, shape[0] - first), *shape[1:])
                weights.read_into(values, name, starts)
                if non_finite({name: values}):
                    raise CheckpointError(f"{weights.name}: {name} holds NaN or infinity; get the files again")
                task.advance(values.numel())
                yield Block(f"model.{name}", shape, starts, values)

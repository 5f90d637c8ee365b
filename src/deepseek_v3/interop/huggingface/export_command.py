"""The command `dsv3 export`: writes a checkpoint as a directory that other tools read."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface.pretrained_folder import (
    SHARD_SIZE,
    check_tokenizer,
    refuse_existing,
    save_pretrained,
)
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.utils.command_line import print_next_steps
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.text import pluralize


class Dtype(str, Enum):
    """The types in which weights can be exported."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Quantization(str, Enum):
    """The quantizations in which weights can be exported."""

    none = "none"
    fp8 = "fp8"


_TORCH = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}


def export_model(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a folder of them: the newest undamaged.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The directory to write; it must not exist.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights that are not quantized.")] = Dtype.bf16,
    quantization: Annotated[
        Quantization, typer.Option(help="fp8: e4m3 with 128×128 scales, for what the release has in FP8.")
    ] = Quantization.none,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The most bytes of a file of weights, such as 500MB or 5GB.")
    ] = SHARD_SIZE,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Write this tokenizer's files, with its chat template, in place of the checkpoint's."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Write the averages of the weights.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face directory."""
    configure_logging()
    refuse_existing(directory)
    given = None if tokenizer is None else Tokenizer.load(tokenizer)
    saved = load_model(checkpoint, torch.device("cpu"), averaged=ema)
    if given is not None:
        check_tokenizer(given, saved.model.config, tokenizer)
        _warn_of_other_ids(given, saved.tokenizer, tokenizer)
    save_pretrained(
        saved.model,
        directory,
        tokenizer=given or saved.tokenizer,
        dtype=_TORCH[dtype],
        quantization=None if quantization is Quantization.none else "fp8",
        max_shard_size=max_shard_size,
    )
    size = sum(path.stat().st_size for path in directory.iterdir())
    get_logger("Weights").info(
        f"{directory}: {size / 1e6:,.1f} MB for Transformers, vLLM, SGLang and llama.cpp's converter"
    )
    print_next_steps(
        ["dsv3", "generate", "--checkpoint", directory, "--prompt", "The"],
        ["vllm", "serve", directory],
    )


def _warn_of_other_ids(given: Tokenizer, own: Tokenizer, path: Path | None) -> None:
    """Warns if ids that the model was trained on stand for other tokens in the given tokenizer."""
    other = [id_ for id_ in range(own.vocab_size) if given.token(id_) != own.token(id_)]
    if other:
        get_logger("Weights").warning(
            f"{path}: {pluralize(len(other), 'id')} of the checkpoint's tokenizer, from id {other[0]} on, "
            f"{'is another token' if len(other) == 1 else 'are other tokens'} there, and the model will read "
            "and write them as it was trained; use a tokenizer that only adds to the checkpoint's"
        )

"""The command `dsv3 tokenize`, which turns text into token ids on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.data_config import DEFAULT_TOKENS
from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.tokenize_corpus import PYTHON_STDLIB, SEQUENCE_LENGTH, TokenFormat, tokenize_corpus
from deepseek_v3.utils.command_line import integer_option, number_option, override_options, print_next_steps
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.text import pluralize


def tokenize(
    source: Annotated[
        str | None, typer.Option("--input", help="A text file, a .jsonl file, or a folder of either.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help=f"Instead of --input: {PYTHON_STDLIB}, the text inside every Python.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")] = DEFAULT_TOKENS,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Use this tokenizer.json, or that of a Hugging Face directory, instead of training one."),
    ] = None,
    end_of_text: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="The token of that tokenizer which ends a document.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=integer_option(), help="Train a byte-level BPE tokenizer with this many ids."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a JSONL line that holds the text.")] = "text",
    holdout: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            parser=number_option,
            help="Share of the text kept for evaluation.",
            show_default="0.02, at least one window",
        ),
    ] = None,
    sequence_length: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(at_least=2),
            help="Tokens in a window of the model to train; each split holds at least one.",
        ),
    ] = SEQUENCE_LENGTH,
    fim_rate: Annotated[
        float,
        typer.Option(
            metavar="SHARE", parser=number_option, help="Share of documents rearranged for fill-in-the-middle."
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", parser=integer_option(), help="Chooses where fill-in-the-middle splits documents."
        ),
    ] = 0,
    token_format: Annotated[
        TokenFormat,
        typer.Option("--format", help="Token shards, or the Megatron-LM datasets train and holdout."),
    ] = TokenFormat.SHARDS,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(at_least=1, at_most=4096),
            help="Processes that encode; by default one for each core.",
        ),
    ] = None,
) -> None:
    """Turn text into token ids, in a training and a hold-out split."""
    configure_logging()
    if (source is None) == (corpus is None):
        raise DataError("give one of --input and --corpus")
    if corpus not in (None, PYTHON_STDLIB):
        raise DataError(f"--corpus {corpus}: expected {PYTHON_STDLIB}; for text of your own use --input")
    summary = tokenize_corpus(
        corpus or str(source),
        output,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        end_of_text=end_of_text,
        holdout=holdout,
        fim_rate=fim_rate,
        seed=seed,
        sequence_length=sequence_length,
        text_field=text_field,
        workers=workers,
        token_format=token_format,
    )
    get_logger("Data").info(
        f"{summary.output}: {summary.train.tokens:,} training tokens in "
        f"{pluralize(summary.train.documents, 'document')},\n{summary.holdout.tokens:,} held-out tokens in "
        f"{summary.holdout.documents:,}, vocabulary {summary.vocab_size:,}"
    )
    print_next_steps(_training(output, sequence_length))


def _training(tokens: Path, sequence_length: int) -> list[str]:
    """The command that trains the smallest size on these tokens, with the same sequence length."""
    size = "tiny" if sequence_length <= load_config("tiny").model.max_position_embeddings else "1b"
    overrides = []
    if tokens != DEFAULT_TOKENS:
        overrides = [f"data.path={tokens}", f"checkpoint.directory=checkpoints/{tokens.name}"]
        overrides += [f"logging.directory=runs/{tokens.name}"]
    if size == "tiny":
        overrides.append("data.corpus=null")  # the config names another corpus
    if load_config(size).training.sequence_length != sequence_length:
        overrides.append(f"training.sequence_length={sequence_length}")
    if size != "tiny":
        overrides.append("model.vocab_size=null")  # the config has the published vocabulary size
    return ["dsv3", "train", "--config", size, *override_options(overrides)]

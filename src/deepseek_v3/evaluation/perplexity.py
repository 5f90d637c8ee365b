"""The held-out loss of a model, compared with n-gram models that are fitted to its training tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.table import Table

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.evaluation.ngrams import ngram_losses
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.training.data import DocumentIds, check_vocabulary
from deepseek_v3.training.loss import Objective
from deepseek_v3.training.validation import ValidationLoss, ValidationWindows, Validator, main_losses
from deepseek_v3.utils.command_line import integer_option, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import CheckpointError, DataError
from deepseek_v3.utils.logging import configure_logging, get_console

_TOKENS_AT_ONCE = 2**20
_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Comparison:
    """Held-out losses in nats per token, all over the same target tokens."""

    model: ValidationLoss
    bigram: float
    unigram: float

    def table(self) -> Table:
        """One row per model, best first: nats per token, bits per byte and perplexity."""
        table = Table("model", "nats per token", "bits per byte", "perplexity")
        rows = [("trained model", self.model.loss), ("bigram", self.bigram), ("unigram", self.unigram)]
        for name, loss in sorted(rows, key=lambda row: row[1]):
            perplexity = math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf
            table.add_row(name, f"{loss:.4f}", f"{self.model.in_bits_per_byte(loss):.4f}", f"{perplexity:,.1f}")
        return table


def compare_with_ngrams(
    held_out: ValidationLoss, shards: TokenShards, config: RunConfig, trained_tokens: int
) -> Comparison:
    """Compares a measured loss with n-gram models fitted to the first `trained_tokens` tokens in training order.

    All are measured on the same targets. Tokens that were trained on several times are counted once.
    """
    length = config.training.sequence_length
    loader = TokenLoader(shards, sequence_length=length, seed=config.training.seed)
    trained = min(max(1, trained_tokens // length), loader.num_samples)
    if trained == loader.num_samples:
        loader = TokenLoader(shards, sequence_length=length, shuffle=False)  # the whole epoch, and faster to read
    measured = ValidationWindows(shards, length, held_out.windows * length)
    losses = ngram_losses(
        partial(_blocks, loader, trained),
        measured.blocks,
        shards.index.vocab_size,
        not_before=shards.index.end_of_text if config.data.mask_documents else None,
    )
    return Comparison(held_out, losses.bigram, losses.unigram)


def measure_saved(saved: LoadedModel, shards: TokenShards, tokens: int, device: torch.device) -> ValidationLoss:
    """The loss of a saved model on at most `tokens` held-out tokens, measured as in its training run."""
    evaluation = Validator(shards, saved.config, tokens)
    documents = DocumentIds(shards, saved.config.data.mask_documents)
    return evaluation.measure(partial(main_losses, Objective(saved.model), documents), device)


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a folder of them: the newest undamaged.")],
    data: Annotated[Path | None, typer.Option(help="Token shards; those of the run if left out.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=integer_option(at_least=1), help="Held-out tokens to read; all if left out."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure a checkpoint's held-out loss, beside a unigram and a bigram model."""
    configure_logging()
    place = select_device(device)
    saved = load_model(checkpoint, place)
    shards = TokenShards.open(data or saved.config.data.path)
    check_vocabulary(shards, saved.config.model)
    _check_tokenizer(shards, saved, checkpoint)
    held_out = measure_saved(saved, shards, tokens or shards.num_tokens("holdout"), place)
    if not math.isfinite(held_out.loss):
        raise CheckpointError(
            f"{checkpoint}: its held-out loss is {held_out.loss}, expected a number; its training had diverged, so "
            "use an earlier checkpoint"
        )
    comparison = compare_with_ngrams(held_out, shards, saved.config, saved.tokens)
    console = get_console()
    console.print(f"{checkpoint}, step {saved.step}, on {held_out.tokens:,} held-out tokens of {shards.directory}")
    console.print(comparison.table())
    same = [] if device == "auto" else ["--device", device]
    print_next_steps(["dsv3", "generate", "--checkpoint", checkpoint, "--prompt", "The", *same])


def _check_tokenizer(shards: TokenShards, saved: LoadedModel, checkpoint: Path) -> None:
    """Raises DataError if the shards were tokenized with another tokenizer than that of the model."""
    if shards.load_tokenizer().to_json() != saved.tokenizer.to_json():
        raise DataError(
            f"{shards.directory}: was tokenized by another tokenizer, of {shards.index.vocab_size:,} ids, than the "
            f"one of {saved.tokenizer.vocab_size:,} ids that {checkpoint} was trained with, so its ids mean "
            "other text; tokenize the text with `dsv3 tokenize --tokenizer` and the tokenizer.json of the run's "
            "token shards"
        )


def _blocks(loader: TokenLoader, windows: int) -> Iterator[Int64Array]:
    """The first `windows` samples of a loader, about a million tokens at a time; shows its progress."""
    at_once = max(1, _TOKENS_AT_ONCE // loader.sequence_length)
    console = get_console()
    for first in track(
        range(0, windows, at_once),
        "Counting n-grams",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        yield loader.batch(first, min(at_once, windows - first))

"""The held-out loss of a model, compared with n-gram models that are fitted to its training tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.source import TokenSource
from deepseek_v3.evaluation.ngrams import ngram_losses
from deepseek_v3.evaluation.text_loss import perplexity
from deepseek_v3.evaluation.text_sources import check_tokenizer
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.training.data import DocumentIds, check_vocabulary
from deepseek_v3.training.loss import Objective
from deepseek_v3.training.validation import ValidationLoss, ValidationWindows, Validator, main_losses
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_console

_TOKENS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Comparison:
    """Held-out losses in nats per token, all over the same target tokens."""

    model: ValidationLoss
    bigram: float
    unigram: float

    def table(self) -> Table:
        """One row per model, best first: nats per token, bits per byte and perplexity."""
        table = Table("model", "nats per token", "bits per byte", "perplexity")
        for name, loss in sorted(self._losses().items(), key=lambda row: row[1]):
            bits = self.model.in_bits_per_byte(loss)
            table.add_row(name, f"{loss:.4f}", f"{bits:.4f}", f"{perplexity(loss):,.1f}")
        return table

    def as_json(self) -> dict[str, Any]:
        """What was measured, and the loss of each model."""
        models = {
            name: {
                "loss": loss,
                "perplexity": perplexity(loss),
                "bits_per_byte": self.model.in_bits_per_byte(loss),
            }
            for name, loss in self._losses().items()
        }
        return {"tokens": self.model.tokens, "bytes": round(self.model.num_bytes), "models": models}

    def _losses(self) -> dict[str, float]:
        return {"trained model": self.model.loss, "bigram": self.bigram, "unigram": self.unigram}


def compare_with_ngrams(
    held_out: ValidationLoss, shards: TokenSource, config: RunConfig, trained_tokens: int
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
        shards.vocab_size,
        not_before=shards.end_of_text if config.data.mask_documents else None,
    )
    return Comparison(held_out, losses.bigram, losses.unigram)


def measure_saved(saved: LoadedModel, shards: TokenSource, tokens: int, device: torch.device) -> ValidationLoss:
    """The loss of a saved model on at most `tokens` held-out tokens, measured as in its training run."""
    evaluation = Validator(shards, saved.config, tokens)
    documents = DocumentIds(shards, saved.config.data.mask_documents)
    return evaluation.measure(partial(main_losses, Objective(saved.model), documents), device)


def compare_saved(
    saved: LoadedModel, shards: TokenSource, checkpoint: Path, tokens: int | None, device: torch.device
) -> Comparison:
    """Measures a saved model on at most `tokens` held-out tokens of `shards`, beside n-gram models.

    Raises DataError for shards of another tokenizer, and CheckpointError if the loss is not finite.
    """
    check_vocabulary(shards, saved.config.model)
    check_tokenizer(shards, saved.tokenizer)
    held_out = measure_saved(saved, shards, tokens or shards.num_tokens("holdout"), device)
    if not math.isfinite(held_out.loss):
        raise CheckpointError(
            f"{checkpoint}: its held-out loss is {held_out.loss}, expected a number; its training had diverged, so "
            "use an earlier checkpoint"
        )
    return compare_with_ngrams(held_out, shards, saved.config, saved.tokens)


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

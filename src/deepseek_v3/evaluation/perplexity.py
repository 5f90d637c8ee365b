"""The held-out loss of a model, compared with n-gram models that are fitted to its training tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.mixture import source_seed
from deepseek_v3.data.tokens.mixture_order import MixtureOrder
from deepseek_v3.data.tokens.source import RunTokens, TokenSource, mean_by_share
from deepseek_v3.evaluation.ngrams import ngram_losses_of_each
from deepseek_v3.evaluation.text_loss import perplexity
from deepseek_v3.evaluation.text_sources import check_tokenizer
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.training.data import DocumentIds, check_vocabulary
from deepseek_v3.training.loss import Objective
from deepseek_v3.training.validation import MixtureValidator, ValidationLoss, ValidationWindows, evaluate
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_console

_TOKENS_AT_ONCE = 2**20
_ALL = 2**62  # tokens, more than any split has


@dataclass(frozen=True)
class Comparison:
    """Held-out losses in nats per token, all over the same target tokens.

    Of a mixture these are the losses of `MixtureValidator`, and `by_source` has those of every source.
    """

    model: ValidationLoss
    bigram: float
    unigram: float
    by_source: Mapping[str, Comparison] = field(default_factory=dict)

    def table(self) -> Table:
        """One row per model, best first: nats per token, bits per byte and perplexity."""
        table = Table(
            *(["source"] if self.by_source else []), "model", "nats per token", "bits per byte", "perplexity"
        )
        for source, each in {"": self, **self.by_source}.items():
            own = [source or "all, by weight"] if self.by_source else []
            for name, loss in sorted(each._losses().items(), key=lambda row: row[1]):
                bits = each.model.in_bits_per_byte(loss)
                table.add_row(*own, name, f"{loss:.4f}", f"{bits:.4f}", f"{perplexity(loss):,.1f}")
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
        own = {"tokens": self.model.tokens, "bytes": round(self.model.num_bytes), "models": models}
        sources = {name: each.as_json() for name, each in self.by_source.items()}
        return {**own, "by_source": sources} if sources else own

    def _losses(self) -> dict[str, float]:
        return {"trained model": self.model.loss, "bigram": self.bigram, "unigram": self.unigram}


def compare_with_ngrams(
    held_out: ValidationLoss, tokens: RunTokens, config: RunConfig, trained_tokens: int
) -> Comparison:
    """Compares a measured loss with n-gram models fitted to the first `trained_tokens` tokens in training order.

    All are measured on the same targets. Tokens that were trained on several times are counted once.
    """
    length, parts = config.training.sequence_length, tokens.parts
    counts = MixtureOrder([part.share for part in parts]).counts(max(1, trained_tokens // length))
    losses = list(held_out.by_source.values()) or [held_out]
    ngrams = ngram_losses_of_each(
        lambda: chain.from_iterable(
            _trained_blocks(part.source, number, count, config)
            for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        ),
        [
            ValidationWindows(part.source, length, each.windows * length).blocks
            for part, each in zip(parts, losses, strict=True)
        ],
        tokens.vocab_size,
        not_before=tokens.end_of_text if config.data.mask_documents else None,
    )
    compared = [Comparison(each, own.bigram, own.unigram) for each, own in zip(losses, ngrams, strict=True)]
    if not held_out.by_source:
        return compared[0]
    return Comparison(
        held_out,
        mean_by_share(parts, (each.bigram for each in compared)),
        mean_by_share(parts, (each.unigram for each in compared)),
        dict(zip(held_out.by_source, compared, strict=True)),
    )


def _trained_blocks(source: TokenSource, number: int, count: int, config: RunConfig) -> Iterator[Int64Array]:
    """The first `count` samples of source `number` of a run, each window once."""
    length = config.training.sequence_length
    loader = TokenLoader(source, sequence_length=length, seed=source_seed(config.training.seed, number))
    if count >= loader.num_samples:
        loader = TokenLoader(source, sequence_length=length, shuffle=False)  # the whole epoch, and faster to read
    return _blocks(loader, min(count, loader.num_samples))


def measure_saved(saved: LoadedModel, shards: RunTokens, tokens: int, device: torch.device) -> ValidationLoss:
    """The loss of a saved model on at most `tokens` held-out tokens, measured as in its training run."""
    validator = MixtureValidator(shards, saved.config, tokens)
    documents = DocumentIds(shards, saved.config.data.mask_documents)
    return validator.measure(partial(evaluate, Objective(saved.model), documents), device)


def compare_saved(
    saved: LoadedModel, shards: RunTokens, checkpoint: Path, tokens: int | None, device: torch.device
) -> Comparison:
    """Measures a saved model on at most `tokens` held-out tokens of `shards`, beside n-gram models.

    Raises DataError for shards of another tokenizer, and CheckpointError if the loss is not finite.
    """
    check_vocabulary(shards, saved.config.model)
    check_tokenizer(shards, saved.tokenizer)
    held_out = measure_saved(saved, shards, tokens or _ALL, device)
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

"""How well a model predicts held-out text, beside n-gram models fitted on the tokens that it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.evaluation.ngrams import Ids, bigram_loss, unigram_loss
from deepseek_v3.model.saved import load_model
from deepseek_v3.training.batches import Documents, check_vocabulary
from deepseek_v3.training.holdout import HeldOutEvaluation, HeldOutLoss, main_losses
from deepseek_v3.training.loss import Objective
from deepseek_v3.utils.distributed import select_device
from deepseek_v3.utils.logging import configure_logging, get_console


@dataclass(frozen=True)
class Comparison:
    """Held-out losses in nats per token, all over the same tokens."""

    model: HeldOutLoss
    bigram: float
    unigram: float

    def table(self) -> Table:
        """The three, best first, in nats per token, bits per byte and perplexity."""
        table = Table("model", "nats per token", "bits per byte", "perplexity")
        bits_per_nat = self.model.bits_per_byte / self.model.loss
        rows = [("trained model", self.model.loss), ("bigram", self.bigram), ("unigram", self.unigram)]
        for name, loss in sorted(rows, key=lambda row: row[1]):
            table.add_row(name, f"{loss:.4f}", f"{loss * bits_per_nat:.4f}", f"{math.exp(loss):,.1f}")
        return table


def compare_with_ngrams(
    held_out: HeldOutLoss, shards: TokenShards, config: RunConfig, trained_tokens: int
) -> Comparison:
    """Sets a measured loss beside n-gram models of the first `trained_tokens` tokens in training order."""
    fitted = _tokens_trained_on(shards, config, trained_tokens)
    measured = shards.read("holdout", 0, held_out.tokens + 1).astype(np.int64)
    vocab_size = shards.index.vocab_size
    return Comparison(
        model=held_out,
        bigram=bigram_loss(fitted, measured, vocab_size),
        unigram=unigram_loss(fitted, measured, vocab_size),
    )


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a folder of them: the newest undamaged.")],
    data: Annotated[Path | None, typer.Option(help="Token shards; those of the run if left out.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens to read; all if left out.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure a checkpoint's held-out loss, beside a unigram and a bigram model."""
    configure_logging()
    place = select_device(device)
    saved = load_model(checkpoint, place)
    shards = TokenShards.open(data or saved.config.data.path)
    check_vocabulary(shards, saved.config.model)
    evaluation = HeldOutEvaluation(shards, saved.config, tokens or shards.num_tokens("holdout"))
    documents = Documents(shards, saved.config.data.mask_documents)
    held_out = evaluation.measure(partial(main_losses, Objective(saved.model), documents), place)
    comparison = compare_with_ngrams(held_out, shards, saved.config, saved.tokens)
    console = get_console()
    console.print(f"{checkpoint}, step {saved.step}, on {held_out.tokens:,} held-out tokens of {shards.directory}")
    console.print(comparison.table())


def _tokens_trained_on(shards: TokenShards, config: RunConfig, trained_tokens: int) -> Ids:
    """The training split as far as the run has read it: whole, or the windows (windows, tokens) of a part."""
    length = config.training.sequence_length
    loader = TokenLoader(shards, sequence_length=length, seed=config.training.seed)
    windows = trained_tokens // length
    if windows >= loader.num_samples:
        return shards.read("train", 0, shards.num_tokens("train")).astype(np.int64)
    return loader.batch(0, max(windows, 1))

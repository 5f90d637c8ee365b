"""The loss of a model on texts, by source.

Each document is scored on its own: its tokens follow the marker that begins a text, in windows as
`scoring.rolling_windows` cuts them. For the documents of a source, with all sums in float64,

    loss            = - sum of log P(token | tokens before it in its window) / number of tokens      nats per token
    perplexity      = exp(loss)
    bits per byte   = - sum of log P / (ln 2 · bytes of the UTF-8 text)

End-of-text after a document is not scored, because it is no part of the text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_v3.evaluation.scoring import BATCH_TOKENS, Scorer, Window, rolling_windows
from deepseek_v3.evaluation.text_sources import EncodedDocument
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.progress import ProgressTask
from deepseek_v3.utils.text import format_value, table

MAX_SOURCES = 1000
_LARGEST_EXPONENT = math.log(sys.float_info.max)
_TOKENS_AT_ONCE = 64 * BATCH_TOKENS  # of the windows that are sorted by length together
_LEAST_TOKENS = 32  # as which a shorter window counts there, because its objects take memory too


@dataclass
class SourceLoss:
    """What was measured on one source, or on all: `nats` is the summed loss of its `tokens`."""

    name: str
    documents: int = 0
    tokens: int = 0
    num_bytes: float = 0.0
    nats: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that is larger than a float64."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The summed loss in bits for each byte of UTF-8 text, which is comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def as_json(self) -> dict[str, Any]:
        """All fields and results."""
        return {
            "name": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": round(self.num_bytes),
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinity if that is larger than a float64."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


@dataclass(frozen=True)
class WindowRule:
    """How long documents are cut: at most `context` inputs, and `stride` new targets in each later window."""

    context: int
    stride: int

    @classmethod
    def checked(cls, context: int | None, stride: int | None, most: int) -> WindowRule:
        """By default, `context` is `most`, that of the model, and `stride` is `context`. Raises DataError."""
        context = most if context is None else context
        if context > most:
            raise DataError(f"--context {context:,}: expected at most the model's context of {most:,} tokens")
        if stride is not None and stride > context:
            raise DataError(f"--stride {stride:,}: expected at most the context of {context:,} tokens")
        return cls(context, stride or context)


def measure_texts(
    scorer: Scorer, documents: Iterable[EncodedDocument], start: int, rule: WindowRule, progress: ProgressTask
) -> list[SourceLoss]:
    """The losses of the sources, in the order of their first documents.

    `start` is the token before each text. Memory is bounded by the largest document. Raises DataError for more than
    MAX_SOURCES sources, or if a source has no token, and CheckpointError if the model's logits are not finite.
    """
    losses: dict[str, SourceLoss] = {}
    for names, windows in _groups(_windows(documents, losses, start, rule)):
        for index, scores in scorer.score(windows):
            loss = losses[names[index]]
            loss.nats -= float(scores.log_probabilities.sum())
            loss.tokens += len(scores.log_probabilities)
            progress.advance(len(scores.log_probabilities))
    for loss in losses.values():
        if not loss.tokens:
            raise DataError(f"{loss.name}: its text has no token to score; give more text")
    return list(losses.values())


def _windows(
    documents: Iterable[EncodedDocument], losses: dict[str, SourceLoss], start: int, rule: WindowRule
) -> Iterator[tuple[str, Window]]:
    """Counts the documents and bytes of each source, and yields its windows."""
    for document in documents:
        loss = losses.setdefault(document.source, SourceLoss(document.source))
        if len(losses) > MAX_SOURCES:
            raise DataError(f"found more than {MAX_SOURCES:,} sources; name a field with fewer different values")
        loss.documents += 1
        loss.num_bytes += document.num_bytes
        for window in rolling_windows(document.ids, start, rule.context, rule.stride):
            yield document.source, window


def _groups(windows: Iterable[tuple[str, Window]]) -> Iterator[tuple[list[str], list[Window]]]:
    names: list[str] = []
    group: list[Window] = []
    tokens = 0
    for name, window in windows:
        names.append(name)
        group.append(window)
        tokens += max(len(window.inputs), _LEAST_TOKENS)
        if tokens >= _TOKENS_AT_ONCE:
            yield names, group
            names, group, tokens = [], [], 0
    if group:
        yield names, group


def total_of(losses: Sequence[SourceLoss]) -> SourceLoss:
    """All sources as one: every token and every byte counts the same."""
    return SourceLoss(
        "total",
        sum(loss.documents for loss in losses),
        sum(loss.tokens for loss in losses),
        sum(loss.num_bytes for loss in losses),
        math.fsum(loss.nats for loss in losses),
    )


def loss_table(losses: Sequence[SourceLoss]) -> list[str]:
    """The lines of a table: a row for each source, and their total if there are several."""
    header = ["source", "documents", "tokens", "bytes", "nats per token", "perplexity", "bits per byte"]
    rows = [*losses, total_of(losses)] if len(losses) > 1 else losses
    return table(header, [_row(loss) for loss in rows])


def _row(loss: SourceLoss) -> list[str]:
    counts = [f"{count:,}" for count in (loss.documents, loss.tokens, round(loss.num_bytes))]
    name = loss.name if loss.name.isprintable() else format_value(loss.name)
    return [name, *counts, f"{loss.loss:.4f}", f"{loss.perplexity:,.2f}", f"{loss.bits_per_byte:.4f}"]

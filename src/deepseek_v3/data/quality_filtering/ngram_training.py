"""Training of n-gram models with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998).

A model of good documents comes with limits: the perplexities that divide a corpus into head, middle and tail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from deepseek_v3.config.base import Section
from deepseek_v3.config.errors import describe_errors
from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array
from deepseek_v3.data.quality_filtering.ngram_model import BEGIN, END, UNKNOWN, NgramModel, previous_rows
from deepseek_v3.data.quality_filtering.perplexity_score import NEW_LINE, LanguageModel, build_sentences, tokenize
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

PERCENTILES = (30, 60)  # percentiles of the perplexities of reference documents; see `PerplexityLimits`
_FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)  # KenLM's, for small texts that lack n-grams of some count
_NEVER = -99.0  # the log10 probability of BEGIN, which is never predicted


class PerplexityLimits(Section):
    """The perplexities that divide documents into head, middle and tail, in a JSON file beside the model.

    They are the 30th and 60th percentile of `documents` reference documents, as in CCNet's code; the paper (Wenzek
    et al. 2020) says thirds. A document below `head` belongs to the head, any other below `middle` to the middle.
    """

    format_version: Literal[1] = 1
    head: Annotated[float, Field(gt=0)]
    middle: Annotated[float, Field(gt=0)]
    documents: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, model: LanguageModel, reference: Sequence[str]) -> PerplexityLimits:
        """Computes the limits from reference documents. Raises DataError if none of them has a word."""
        perplexities = model.perplexities(reference)
        perplexities = perplexities[np.isfinite(perplexities)]
        if not len(perplexities):
            raise DataError("reference documents: found none with words; give more text, or --reference FILES")
        head, middle = np.percentile(perplexities, PERCENTILES).tolist()
        return cls(head=head, middle=middle, documents=len(perplexities))

    @classmethod
    def read(cls, model: Path) -> PerplexityLimits | None:
        """Reads the limits beside a model; None if there are none. Raises DataError if the file is damaged."""
        path = _limits_path(model)
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise DataError(f"{describe_errors(error, cls, {(): str(path)})}; train the model again") from None

    def write(self, model: Path) -> None:
        """Writes the limits beside a model."""
        with atomic_write(_limits_path(model)) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def train_language_model(texts: Iterable[str], order: int) -> NgramModel:
    """Trains a model of the lines of texts. Raises DataError if they have no words."""
    marks = {UNKNOWN: 0, BEGIN: 1, END: 2, NEW_LINE: -1}
    rows = defaultdict(count(3).__next__, marks)
    numbered = [np.fromiter(map(rows.__getitem__, tokenize(text)), np.int64) for text in texts]
    words = build_sentences(chain.from_iterable(numbered), [*map(len, numbered)], rows[BEGIN], rows[END]).words
    if not len(words):
        raise DataError("documents to train a language model on: found no words; give files with text")
    del rows[NEW_LINE]
    return train_kneser_ney(words, [*rows], order)


class _Ngrams(NamedTuple):
    """All n-grams of one length.

    For each: its key, its raw count, the row of all but its last word (`contexts`), the row of all but its first
    word (`suffixes`), and whether it starts with `BEGIN`.
    """

    keys: Int64Array
    counts: Int64Array
    contexts: Int64Array
    suffixes: Int64Array
    from_begin: BoolArray


def train_kneser_ney(sentences: Int64Array, words: list[str], order: int) -> NgramModel:
    """Trains a model of `order` from concatenated sentences.

    `sentences` (int64 [n]) are indices into `words`; every sentence starts with `BEGIN` and ends with `END`.
    """
    lengths = _count_ngrams(sentences, words, order)
    predicted = np.array([word != BEGIN for word in words])
    keys, log_probs, backoffs = [], [], []
    probs = np.where(predicted, 1 / predicted.sum(), 0.0)  # order 0: the uniform distribution
    for k, ngrams in enumerate(lengths, start=1):
        adjusted = _adjusted_counts(ngrams, lengths[k] if k < order else None)
        if k == 1:
            adjusted[~predicted] = 0
        taken = _discounts(adjusted)[np.minimum(adjusted, 3)]
        contexts = ngrams.contexts
        mass = np.bincount(contexts, adjusted, minlength=1 if k == 1 else len(lengths[k - 2].counts))
        left = np.divide(
            np.bincount(contexts, taken, minlength=len(mass)), mass, out=np.ones_like(mass), where=mass > 0
        )
        lower = probs if k == 1 else probs[ngrams.suffixes]
        probs = (adjusted - taken) / mass[contexts] + left[contexts] * lower
        if k > 1:
            keys.append(ngrams.keys)
            backoffs.append(np.log10(left).astype(np.float32))
        log_probs.append(np.log10(probs, out=np.full(len(probs), _NEVER), where=probs > 0).astype(np.float32))
    return NgramModel(words, keys, log_probs, backoffs)


def _count_ngrams(sentences: Int64Array, words: list[str], order: int) -> list[_Ngrams]:
    """Counts the n-grams of lengths 1 to `order`."""
    begin = words.index(BEGIN)
    begins = sentences == begin
    every = np.arange(len(words))
    nothing = np.zeros(len(words), np.int64)
    lengths = [_Ngrams(every, np.bincount(sentences, minlength=len(words)), nothing, nothing, every == begin)]
    rows = sentences
    for _ in range(2, order + 1):
        contexts = previous_rows(rows, begins)
        inside = np.flatnonzero(contexts >= 0)
        keys, first, numbers, counts = np.unique(
            contexts[inside] * len(words) + sentences[inside],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        contexts, suffixes = contexts[inside[first]], rows[inside[first]]
        lengths.append(_Ngrams(keys, counts, contexts, suffixes, lengths[-1].from_begin[contexts]))
        rows = np.full(len(sentences), -1, np.int64)
        rows[inside] = numbers
    return lengths


def _adjusted_counts(ngrams: _Ngrams, longer: _Ngrams | None) -> Int64Array:
    """Returns the number of different words that precede each n-gram.

    The longest n-grams and those that start a sentence keep their raw count.
    """
    if longer is None:
        return ngrams.counts.copy()
    different = np.bincount(longer.suffixes, minlength=len(ngrams.counts))
    return np.where(ngrams.from_begin, ngrams.counts, different)


def _discounts(counts: Int64Array) -> Float64Array:
    """Returns the discounts of counts of 0, 1, 2, and 3 or more."""
    have = np.bincount(counts, minlength=5)[:5].astype(np.float64)
    if not have[1:].all():
        return np.array(_FALLBACK_DISCOUNTS)
    share = have[1] / (have[1] + 2 * have[2])
    taken = np.array([0.0, *(k - (k + 1) * share * have[k + 1] / have[k] for k in (1, 2, 3))])
    return taken if (taken[1:] > 0).all() else np.array(_FALLBACK_DISCOUNTS)


def _limits_path(model: Path) -> Path:
    return model.with_name(f"{model.name}.limits.json")

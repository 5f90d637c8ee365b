"""Training n-gram models with interpolated modified Kneser-Ney smoothing (Chen & Goodman 1998)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.quality.ngram_model import BEGIN, Float64s, Int64s, NgramModel, before

_FALLBACK = (0.0, 0.5, 1.0, 1.5)  # KenLM's discounts where a small text has no n-grams of some count
_NEVER = -99.0  # the log10 probability of BEGIN, which is never predicted


class _Ngrams(NamedTuple):
    """All n-grams of a length: for each its key, raw count, the rows of all but its last and but its first word."""

    keys: Int64s
    counts: Int64s
    contexts: Int64s
    suffixes: Int64s
    from_begin: NDArray[np.bool_]


def train_kneser_ney(sentences: Int64s, words: list[str], order: int) -> NgramModel:
    """A model of `order` from sentences that stand one behind the other.

    `sentences` are indices into `words` (int64 [n]); every sentence starts with that of `BEGIN`, and ends with END.
    """
    lengths = _counted(sentences, words, order)
    predicted = np.array([word != BEGIN for word in words])
    keys, log_probs, backoffs = [], [], []
    probs = np.where(predicted, 1 / predicted.sum(), 0.0)  # of order 0: all words alike
    for k, ngrams in enumerate(lengths, start=1):
        adjusted = _adjusted(ngrams, lengths[k] if k < order else None)
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


def _counted(sentences: Int64s, words: list[str], order: int) -> list[_Ngrams]:
    """The n-grams of length 1 to `order`."""
    begin = words.index(BEGIN)
    begins = sentences == begin
    every = np.arange(len(words))
    nothing = np.zeros(len(words), np.int64)
    lengths = [_Ngrams(every, np.bincount(sentences, minlength=len(words)), nothing, nothing, every == begin)]
    rows = sentences
    for _ in range(2, order + 1):
        contexts = before(rows, begins)
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


def _adjusted(ngrams: _Ngrams, longer: _Ngrams | None) -> Int64s:
    """How many words stand before each n-gram, or its count, if it is one of the longest or begins a sentence."""
    if longer is None:
        return ngrams.counts.copy()
    different = np.bincount(longer.suffixes, minlength=len(ngrams.counts))
    return np.where(ngrams.from_begin, ngrams.counts, different)


def _discounts(counts: Int64s) -> Float64s:
    """What to take from counts of 0, 1, 2, and 3 or more."""
    have = np.bincount(counts, minlength=5)[:5].astype(np.float64)
    if not have[1:].all():
        return np.array(_FALLBACK)
    share = have[1] / (have[1] + 2 * have[2])
    taken = np.array([0.0, *(k - (k + 1) * share * have[k + 1] / have[k] for k in (1, 2, 3))])
    return taken if (taken[1:] > 0).all() else np.array(_FALLBACK)

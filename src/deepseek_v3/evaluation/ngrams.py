"""The simplest language models there are, as yardsticks for a trained one: unigrams and bigrams of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def unigram_loss(fitted: Ids, held_out: Ids, vocab_size: int) -> float:
    """Mean -log P(token), in nats, over `held_out[1:]` with add-one counts of `fitted`.

    `held_out` int64 (tokens,); `fitted` int64 (tokens,), or (windows, tokens) where it is no single text.
    """
    return float(-np.log(_unigram(fitted, vocab_size)[held_out[1:]]).mean())


def bigram_loss(fitted: Ids, held_out: Ids, vocab_size: int) -> float:
    """Mean -log P(token | token before), in nats, over `held_out[1:]`; both as in `unigram_loss`.

    No pair is counted across the border of two windows.
    Absolute discounting with one discount, estimated from how many pairs occur once and twice, and backing off
    to the unigram (Ney, Essen and Kneser 1994, eq. 18 and 26).
    """
    pairs, counts = np.unique(fitted[..., :-1] * vocab_size + fitted[..., 1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = float(once / max(once + 2 * twice, 1))
    contexts = pairs // vocab_size
    context_totals = np.bincount(contexts, weights=counts, minlength=vocab_size)
    distinct_followers = np.bincount(contexts, minlength=vocab_size)
    left_for_unigram = np.where(
        context_totals > 0, discount * distinct_followers / np.maximum(context_totals, 1), 1
    )

    before, after = held_out[:-1], held_out[1:]
    pair_counts = _counts_of(before * vocab_size + after, pairs, counts)
    discounted = np.maximum(pair_counts - discount, 0) / np.maximum(context_totals[before], 1)
    return float(-np.log(discounted + left_for_unigram[before] * _unigram(fitted, vocab_size)[after]).mean())


def _unigram(fitted: Ids, vocab_size: int) -> Floats:
    counts = np.bincount(fitted.ravel(), minlength=vocab_size) + 1.0
    return counts / counts.sum()


def _counts_of(wanted: Ids, pairs: Ids, counts: Ids) -> Ids:
    """The count of each wanted pair; `pairs` is sorted."""
    places = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    return np.where(pairs[places] == wanted, counts[places], 0)

"""N-grams of words that stand more than once in their document, for all documents of a batch at once.

An n-gram and the one a word further on make the n-gram that is a word longer, so only those that repeat can grow:
each length costs one sort of what the length before it left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepseek_v3.data.heuristics.arrays import Ints, first_equal, run_of


@dataclass(frozen=True)
class RepeatedNgrams:
    """Where n-grams begin that stand more than once in their document: `positions`, in order.

    `first` says for each of them where in the document it stands first, perhaps here.
    """

    n: int
    positions: Ints
    first: Ints


def repeated_ngrams(words: Ints, starts: Ints, longest: int) -> Iterator[RepeatedNgrams]:
    """For n = 1 to `longest` what repeats. Document d has the words words[starts[d] : starts[d + 1]]."""
    begins = np.zeros(len(words) + 1, np.bool_)
    begins[starts] = True
    positions: Ints = np.arange(len(words))
    keys: Ints = run_of(starts) * (int(words.max(initial=0)) + 1) + words
    for n in range(1, longest + 1):
        same = first_equal(keys)
        repeated = np.bincount(same, minlength=len(same))[same] > 1
        first, positions = positions[same[repeated]], positions[repeated]
        yield RepeatedNgrams(n, positions, first)
        grows = np.flatnonzero((np.diff(positions) == 1) & ~begins[positions[1:]])
        keys = first[grows] * len(words) + first[grows + 1]
        positions = positions[grows]


@dataclass(frozen=True)
class TopNgrams:
    """By document, how often its most frequent n-gram stands there, and where that begins; of equals the first.

    A document with fewer than n words has a count of 0.
    """

    counts: Ints
    positions: Ints


def top_ngrams(ngrams: RepeatedNgrams, starts: Ints) -> TopNgrams:
    """The most frequent n-gram of each document."""
    total = max(int(starts[-1]), 1)
    heads = ngrams.positions[ngrams.positions == ngrams.first]
    counts = np.bincount(ngrams.first, minlength=total)[heads]
    # Frequency before position, both in one number; to begin with, the document's first n-gram stands there once.
    best = np.where(np.diff(starts) >= ngrams.n, 2 * total - 1 - starts[:-1], 0)
    np.maximum.at(best, np.searchsorted(starts, heads, side="right") - 1, counts * total + total - 1 - heads)
    return TopNgrams(best // total, total - 1 - best % total)


@dataclass(frozen=True)
class DuplicateNgrams:
    """By document, the characters in n-grams that stood before, and where the first of them begins, or -1.

    N-grams are taken from left to right and do not overlap.
    """

    characters: Ints
    positions: Ints


def duplicate_ngrams(ngrams: RepeatedNgrams, starts: Ints, ends: Ints) -> DuplicateNgrams:
    """What repeats in each document. The first i words of the batch have ends[i] characters together."""
    later = ngrams.positions[ngrams.positions != ngrams.first]
    totals = np.append(ends[later + ngrams.n] - ends[later], 0)
    firsts, lasts = np.searchsorted(later, starts[:-1]), np.searchsorted(later, starts[1:])
    # The next one that is taken begins n words on or later; where the document has none, that is the 0 at the end.
    following = np.append(np.searchsorted(later, later + ngrams.n), len(later))
    following[:-1][following[:-1] >= np.repeat(lasts, lasts - firsts)] = len(later)
    while (following < len(later)).any():  # each round doubles the n-grams that a total holds
        totals = totals + totals[following]
        following = following[following]
    some = firsts < lasts
    positions = np.append(later, -1)[np.where(some, firsts, -1)]
    return DuplicateNgrams(totals[np.where(some, firsts, -1)], positions)

"""Unigram and bigram models of tokens: baselines for a trained model.

The training tokens are counted block by block, in one or more passes; memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_v3.data.arrays import Float64Array, Int64Array, UInt8Array

# Returns the blocks of a text, from the start in every call; each int64 (windows, tokens). Pairs never span
# windows.
Blocks = Callable[[], Iterable[Int64Array]]

TABLE_BYTES = 2**28
_DISCOUNT_WITHOUT_RARE_PAIRS = 0.5  # above 0, so that an unseen pair has a probability above 0
_MOST = 3  # counts saturate here: the discount needs the pairs that occur once and twice only


@dataclass(frozen=True)
class NgramLosses:
    """Mean losses in nats per token over the targets of some windows."""

    unigram: float
    bigram: float


def ngram_losses(
    fitted: Blocks,
    measured: Blocks,
    vocab_size: int,
    table_bytes: int = TABLE_BYTES,
    not_before: int | None = None,
) -> NgramLosses:
    """The losses of `ngram_losses_of_each` on one text."""
    return ngram_losses_of_each(fitted, [measured], vocab_size, table_bytes, not_before)[0]


def ngram_losses_of_each(
    fitted: Blocks,
    texts: Sequence[Blocks],
    vocab_size: int,
    table_bytes: int = TABLE_BYTES,
    not_before: int | None = None,
) -> list[NgramLosses]:
    """Mean -log P(token) and -log P(token | previous token) over the tokens of each of the measured `texts`.

    The first token of each window has no loss, nor has a token right after the token `not_before`.

    Both models are fitted to the pairs of `fitted`. The unigram model adds one to each count. The bigram model uses
    absolute discounting with one discount, estimated from the numbers of pairs that occur once and twice, and backs
    off to the unigram model (Ney, Essen and Kneser 1994, eq. 18 and 26).

    Counting the pairs of `fitted` takes at most `table_bytes` of memory and ceil(vocab_size² / 4 / `table_bytes`)
    passes over it; the pairs of `texts` take 24 bytes for each different pair.
    """
    measured = [_different_pairs(text, vocab_size) for text in texts]
    pairs = measured[0][0] if len(measured) == 1 else np.unique(np.concatenate([own for own, _ in measured]))
    counts = _counted(fitted, pairs, vocab_size, table_bytes)
    before, after = np.divmod(pairs, vocab_size)
    unigram = (counts.tokens + 1.0) / (counts.tokens.sum() + vocab_size)

    once, twice = counts.once, counts.twice
    discount = once / (once + 2 * twice) if once else _DISCOUNT_WITHOUT_RARE_PAIRS
    totals = counts.contexts[before]
    discounted = np.maximum(counts.pairs - discount, 0) / np.maximum(totals, 1)
    left_for_unigram = np.where(totals > 0, discount * counts.followers[before] / np.maximum(totals, 1), 1)
    bigram = discounted + left_for_unigram * unigram[after]
    losses = []
    for own, times in measured:
        places = np.searchsorted(pairs, own)
        occurrences = np.where(before[places] == not_before, 0, times)
        found = (unigram[after[places]], bigram[places])
        losses.append(NgramLosses(*(_mean_loss(probabilities, occurrences) for probabilities in found)))
    return losses


@dataclass
class _Counts:
    """Counts of a text, per vocabulary id, and of the wanted pairs.

    `contexts` counts a token with another one after it, `followers` the different tokens after a context, `pairs`
    the wanted pairs. `once` and `twice` are the numbers of different pairs with that count.
    """

    tokens: Int64Array
    contexts: Int64Array
    followers: Int64Array
    pairs: Int64Array
    once: int = 0
    twice: int = 0


def _counted(fitted: Blocks, pairs: Int64Array, vocab_size: int, table_bytes: int) -> _Counts:
    """Counts a text; each pass counts the pairs of as many contexts as fit in memory. `pairs` is sorted."""
    counts = _Counts(_zeros(vocab_size), _zeros(vocab_size), _zeros(vocab_size), _zeros(len(pairs)))
    row_bytes = -(-vocab_size // 4)  # two bits for each token that may follow
    rows = max(1, min(vocab_size, table_bytes // row_bytes))
    for first in range(0, vocab_size, rows):
        table = np.zeros(min(rows, vocab_size - first) * row_bytes, np.uint8)
        for before, after in _targets(fitted):
            if first == 0:
                counts.tokens += np.bincount(after, minlength=vocab_size)
                counts.contexts += np.bincount(before, minlength=vocab_size)
            if rows < vocab_size:
                here = (before >= first) & (before < first + rows)
                before, after = before[here], after[here]
            found, times = np.unique(before * vocab_size + after, return_counts=True)
            _add_wanted(counts.pairs, pairs, found, times)
            _add_to_table(counts, table, first, found, times, vocab_size)
    return counts


def _add_wanted(sums: Int64Array, pairs: Int64Array, found: Int64Array, times: Int64Array) -> None:
    """Adds the counts of the wanted pairs that were found; `pairs` and `found` are sorted."""
    if len(pairs):
        places = np.searchsorted(pairs, found).clip(max=len(pairs) - 1)
        wanted = pairs[places] == found
        sums[places[wanted]] += times[wanted]


def _add_to_table(
    counts: _Counts, table: UInt8Array, first: int, found: Int64Array, times: Int64Array, vocab: int
) -> None:
    """Adds different pairs to the table, whose first context is `first`, and updates the counts of counts."""
    contexts, after = np.divmod(found, vocab)
    places = (contexts - first) * -(-vocab // 4) + (after >> 2)
    shifts = ((after & 3) << 1).astype(np.uint8)
    old = (table[places] >> shifts) & 3
    new = np.minimum(old + times, _MOST).astype(np.uint8)
    np.add.at(table, places, (new - old) << shifts)
    counts.followers += np.bincount(contexts[old == 0], minlength=vocab)
    counts.once += int((new == 1).sum()) - int((old == 1).sum())
    counts.twice += int((new == 2).sum()) - int((old == 2).sum())


def _different_pairs(blocks: Blocks, vocab_size: int) -> tuple[Int64Array, Int64Array]:
    """The different pairs of a text, sorted, and the count of each."""
    pairs, times = _zeros(0), _zeros(0)
    for before, after in _targets(blocks):
        found, counts = np.unique(before * vocab_size + after, return_counts=True)
        places: Int64Array
        pairs, places = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        times = np.bincount(places, weights=np.concatenate([times, counts])).astype(np.int64)
    return pairs, times


def _targets(blocks: Blocks) -> Iterator[tuple[Int64Array, Int64Array]]:
    """For each block: all tokens but the last of each window, and the token after each, both flat."""
    for windows in blocks():
        yield windows[:, :-1].ravel(), windows[:, 1:].ravel()


def _zeros(size: int) -> Int64Array:
    return np.zeros(size, np.int64)


def _mean_loss(probabilities: Float64Array, occurrences: Int64Array) -> float:
    return float(-(np.log(probabilities) * occurrences).sum() / occurrences.sum())

"""N-gram losses against counts made by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from deepseek_v3.evaluation.ngrams import bigram_loss, unigram_loss

VOCAB = 7


def _tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length)  # the last id never occurs


def _brute_unigram(fitted: np.ndarray, token: int) -> float:
    return (list(fitted).count(token) + 1) / (len(fitted) + VOCAB)


def _brute_bigram(fitted: np.ndarray, before: int, after: int) -> float:
    pairs = Counter(zip(fitted[:-1].tolist(), fitted[1:].tolist(), strict=True))
    once, twice = list(pairs.values()).count(1), list(pairs.values()).count(2)
    discount = once / (once + 2 * twice)
    followers = {pair[1]: count for pair, count in pairs.items() if pair[0] == before}
    total = sum(followers.values())
    if total == 0:
        return _brute_unigram(fitted, after)
    left = discount * len(followers) / total
    return max(followers.get(after, 0) - discount, 0) / total + left * _brute_unigram(fitted, after)


def test_losses_equal_brute_force_counts() -> None:
    fitted, held_out = _tokens(0, 60), np.append(_tokens(1, 30), [VOCAB - 1, 0])
    unigram = [_brute_unigram(fitted, token) for token in held_out[1:].tolist()]
    assert unigram_loss(fitted, held_out, VOCAB) == pytest.approx(-np.log(unigram).mean())
    pairs = zip(held_out[:-1].tolist(), held_out[1:].tolist(), strict=True)
    bigram = [_brute_bigram(fitted, before, after) for before, after in pairs]
    assert bigram_loss(fitted, held_out, VOCAB) == pytest.approx(-np.log(bigram).mean())


def test_no_pair_is_counted_across_windows() -> None:
    windows = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 2], [0, 1, 4], [2, 3, 4]])
    held_out = np.array([0, 1, 2, 3])
    # Pairs within windows: 01 three times, 12 and 34 twice, 45, 14 and 23 once; so d = 3 / (3 + 2 * 2).
    discount = 3 / 7
    unigram = [(windows.flatten().tolist().count(token) + 1) / (windows.size + VOCAB) for token in range(VOCAB)]
    expected = [
        (3 - discount) / 3 + discount / 3 * unigram[1],
        (2 - discount) / 3 + discount * 2 / 3 * unigram[2],
        (1 - discount) / 1 + discount * unigram[3],
    ]
    assert bigram_loss(windows, held_out, VOCAB) == pytest.approx(-np.log(expected).mean())


@pytest.mark.parametrize("before", range(VOCAB))
def test_probabilities_after_any_token_sum_to_one(before: int) -> None:
    fitted = _tokens(2, 80)
    losses = [bigram_loss(fitted, np.array([before, after]), VOCAB) for after in range(VOCAB)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)

"""N-gram losses against counts made by hand."""

import math
import tracemalloc
from collections import Counter
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.evaluation.ngrams import NgramLosses, ngram_losses, ngram_losses_of_each

VOCAB = 7
Pairs = list[tuple[int, int]]


def _tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length)  # the last id never occurs


def _brute_bigram(pairs: Pairs, after: int, before: int, unigram: float) -> float:
    counts = Counter(pairs)
    once, twice = list(counts.values()).count(1), list(counts.values()).count(2)
    discount = once / (once + 2 * twice) if once else 0.5
    followers = {pair[1]: count for pair, count in counts.items() if pair[0] == before}
    total = sum(followers.values())
    if total == 0:
        return unigram
    left = discount * len(followers) / total
    return max(followers.get(after, 0) - discount, 0) / total + left * unigram


def _blocks(*windows: np.ndarray):
    return lambda: iter([np.atleast_2d(block) for block in windows])


def _brute(fitted: list[np.ndarray], measured: list[np.ndarray], vocab: int = VOCAB) -> NgramLosses:
    pairs = [pair for window in fitted for pair in pairwise(window.tolist())]
    targets = [after for _, after in pairs]
    unigrams, bigrams = [], []
    for before, after in (pair for window in measured for pair in pairwise(window.tolist())):
        unigrams.append((targets.count(after) + 1) / (len(targets) + vocab))
        bigrams.append(_brute_bigram(pairs, after, before, unigrams[-1]))
    return NgramLosses(-np.log(unigrams).mean(), -np.log(bigrams).mean())


# With 7 ids a context takes 2 bytes of the table: all contexts in one pass, three in each of three, one in each.
@pytest.mark.parametrize("table_bytes", [2**20, 6, 1])
def test_losses_equal_brute_force_counts(table_bytes: int) -> None:
    fitted = [_tokens(seed, length) for seed, length in enumerate((60, 60, 2, 31))]
    measured = [np.append(_tokens(9, 30), [VOCAB - 1, 0]), _tokens(8, 12)]
    found = ngram_losses(_blocks(*fitted), _blocks(*measured), VOCAB, table_bytes)
    assert astuple(found) == pytest.approx(astuple(_brute(fitted, measured)))


def test_targets_right_after_one_token_are_left_out() -> None:
    fitted, window = [_tokens(0, 60)], np.array([1, 0, 2, 3, 0, 0, 4, 1])
    found = ngram_losses(_blocks(*fitted), _blocks(window), VOCAB, not_before=0)
    counted = [window[0:2], window[2:4], window[3:5], window[6:8]]
    assert astuple(found) == pytest.approx(astuple(_brute(fitted, counted)))


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 29), min_size=2, max_size=40), min_size=1, max_size=8), st.integers(1, 300))
def test_passes_and_blocks_change_no_count(windows: list[list[int]], table_bytes: int) -> None:
    fitted = [np.array(window) for window in windows]
    measured = np.array(windows[0][::-1])
    whole = ngram_losses(_blocks(*fitted), _blocks(measured), 30)
    assert ngram_losses(_blocks(*fitted[::-1]), _blocks(measured), 30, table_bytes) == whole
    assert astuple(whole) == pytest.approx(astuple(_brute(fitted, [measured], 30)))


def test_no_pair_is_counted_across_windows() -> None:
    windows = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 2], [0, 1, 4], [2, 3, 4]])
    # Pairs within windows: 01 three times, 12 and 34 twice, 45, 14 and 23 once; so d = 3 / (3 + 2 * 2).
    discount = 3 / 7
    targets = windows[:, 1:].flatten().tolist()
    unigram = [(targets.count(token) + 1) / (len(targets) + VOCAB) for token in range(VOCAB)]
    expected = [
        (3 - discount) / 3 + discount / 3 * unigram[1],
        (2 - discount) / 3 + discount * 2 / 3 * unigram[2],
        (1 - discount) / 1 + discount * unigram[3],
    ]
    found = ngram_losses(_blocks(windows), _blocks(np.array([0, 1, 2, 3])), VOCAB)
    assert found.bigram == pytest.approx(-np.log(expected).mean())


def test_text_in_which_no_pair_is_rare_leaves_some_for_new_pairs() -> None:
    twice = _blocks(np.array([0, 1, 0, 1, 0]))
    assert math.isfinite(ngram_losses(twice, _blocks(np.array([0, 0])), VOCAB).bigram)


def test_memory_does_not_grow_with_the_corpus() -> None:
    def peak(blocks: int) -> int:
        tracemalloc.start()
        ngram_losses(lambda: (random.integers(0, 64, (8, 500)) for _ in range(blocks)), _blocks(measured), 64)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    random, measured = np.random.default_rng(0), np.arange(64)
    peak(1)
    assert peak(40) < 1.1 * peak(4)


@pytest.mark.parametrize("before", range(VOCAB))
def test_probabilities_after_any_token_sum_to_one(before: int) -> None:
    fitted = _blocks(_tokens(2, 80))
    losses = [ngram_losses(fitted, _blocks(np.array([before, after])), VOCAB).bigram for after in range(VOCAB)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)


def test_several_texts_have_the_losses_of_each_alone() -> None:
    random = np.random.default_rng(3)
    fitted = _blocks(random.integers(0, VOCAB, (8, 40)))
    texts = [_blocks(random.integers(low, VOCAB, (2, 20))) for low in (0, VOCAB // 2, 1)]
    found = ngram_losses_of_each(fitted, texts, VOCAB, not_before=2)
    assert found == [ngram_losses(fitted, text, VOCAB, not_before=2) for text in texts]

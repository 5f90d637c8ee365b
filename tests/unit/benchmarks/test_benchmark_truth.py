"""The truth that benchmarks of near-duplicate removal are measured against, beside every pair compared by hand."""

import random
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from corpus import edit
from exact_pairs import similar_pairs
from words import words_of

from deepseek_v3.data.sample_corpora import stdlib_documents


def shingles(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))} if words else set()


def by_hand(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    sets = [shingles(text) for text in texts]
    similarities = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i, j in combinations(range(len(texts)), 2)
        if sets[i] and sets[j]
    }
    return {pair: similarity for pair, similarity in similarities.items() if similarity >= threshold}


def found(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    pairs, similarities = similar_pairs(texts, threshold)
    assert pairs.dtype == np.int64
    assert pairs.tolist() == sorted(pairs.tolist())
    return {(one, other): similarity for (one, other), similarity in zip(pairs.tolist(), similarities, strict=True)}


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=25),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_all_pairs_of_short_texts_are_found(texts, threshold):
    assert found(texts, threshold) == by_hand(texts, threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_all_pairs_of_edited_real_text_are_found(threshold):
    chooser = random.Random(0)
    originals = [document.text[:4000] for document in list(stdlib_documents())[::12]]
    edited = [
        edit(text, chooser.choice([0.002, 0.01, 0.03, 0.08]), chooser) for text in originals for _ in range(3)
    ]
    texts = [*originals, *edited, *originals[:5]]
    chooser.shuffle(texts)
    expected = by_hand(texts, threshold)
    assert len(expected) > 100
    assert found(texts, threshold) == expected


def test_case_and_what_stands_between_words_make_no_difference():
    assert found(["One two, three\nfour FIVE six", "one two three four five (six)"], 0.8) == {(0, 1): 1.0}


def test_texts_without_words_are_like_nothing():
    assert found(["", "...", "", "one two", "one two", "one"], 0.8) == {(3, 4): 1.0}
    assert found([], 0.8) == {}

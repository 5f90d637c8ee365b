"""Fill-in-the-middle loses no text, reorders the given share, and depends on text and seed alone."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.tokens.fim import FillInMiddle
from deepseek_v3.data.tokens.tokenizer import FimMarkers, Tokenizer
from deepseek_v3.utils.errors import DataError

MARKERS = FimMarkers(begin=1, hole=2, end=3)
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text, st.integers(0, 2**64))
def test_the_parts_join_to_the_document(text, seed):
    prefix, middle, suffix = FillInMiddle(1.0, seed, MARKERS).split(text)
    assert prefix + middle + suffix == text


@given(any_text, st.integers(0, 9))
def test_at_rate_zero_a_document_stays_as_it_is(text, seed):
    fim = FillInMiddle(0.0, seed, None)
    assert fim.split(text) == [text]
    assert fim.join([[7, 8, 9]]) == [7, 8, 9]


def test_the_order_is_prefix_hole_suffix_end_middle():
    assert FillInMiddle(1.0, 0, MARKERS).join([[10, 11], [20], [30, 31]]) == [1, 10, 11, 2, 30, 31, 3, 20]


def test_the_joined_tokens_follow_the_report():
    """DeepSeek-V3 technical report §4.1."""
    tokenizer = Tokenizer.train([], 260)
    ids = FillInMiddle(1.0, 0, tokenizer.fim).join(tokenizer.encode_batch(["PRE", "MIDDLE", "SUF"]))
    assert tokenizer.decode(ids) == "<|fim_begin|>PRE<|fim_hole|>SUF<|fim_end|>MIDDLE"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_of_documents_is_the_rate(rate):
    fim = FillInMiddle(rate, 3, MARKERS)
    chosen = sum(len(fim.split(f"document {i}")) == 3 for i in range(20_000))
    assert abs(chosen - 20_000 * rate) < 5 * (20_000 * rate * (1 - rate)) ** 0.5


def test_the_cuts_fall_evenly_on_every_pair_of_places():
    """A text of 3 characters has 4 places, so the 2 cuts are 16 equally likely pairs, in either order."""
    expected = {(start, stop): 1 if start == stop else 2 for start in range(4) for stop in range(start, 4)}
    counts = dict.fromkeys(expected, 0)
    for seed in range(16_000):
        prefix, middle, _ = FillInMiddle(1.0, seed, MARKERS).split("abc")
        counts[len(prefix), len(prefix + middle)] += 1
    chi_square = sum((counts[pair] - 1000 * n) ** 2 / (1000 * n) for pair, n in expected.items())
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_seeds_choose_differently():
    texts = [f"document {i}" for i in range(200)]
    choices = {tuple(len(FillInMiddle(0.5, seed, MARKERS).split(text)) for text in texts) for seed in range(20)}
    assert len(choices) == 20


def test_another_process_splits_alike():
    program = (
        "from deepseek_v3.data.tokens.fim import FillInMiddle as F; print(F(1.0, 5, (1, 2, 3)).split('a' * 99))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert elsewhere.strip() == str(FillInMiddle(1.0, 5, MARKERS).split("a" * 99))


def test_a_tokenizer_without_the_markers_is_refused():
    with pytest.raises(DataError, match=r"fim_rate = 0\.1 needs a tokenizer with markers"):
        FillInMiddle(0.1, 0, None)

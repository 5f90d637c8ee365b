"""Long pre-tokens are cut alike in training, here and by the tokenizers library, and training is linear."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import PreTrainedTokenizerFast

from deepseek_v3.data.tokens.long_pieces import LONGEST_PIECE, may_have_long_pieces
from deepseek_v3.data.tokens.tiktoken_encoder import DEEPSEEK
from deepseek_v3.data.tokens.tokenizer import Tokenizer

# One of each class that the splits know, and characters on their borders.
CHARACTERS = [
    *"aZéสि한世あ゛・ー゠\u3040",
    *" \t\n\r\u2003\x1c\x85",
    *"-_.!,。、€™😀",
    *"0²Ⅷ٣",
    *"\x00\x07\u200b\ufffe\ue000",
]
runs = st.tuples(st.sampled_from(CHARACTERS), st.sampled_from([1, 2, 63, 127, 255, 256, 257, 300, 700]))
texts_of_runs = st.lists(runs, max_size=8).map(lambda pairs: "".join(char * count for char, count in pairs))


def uncut() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK])


@cache
def trained() -> Tokenizer:
    texts = [char * 700 for char in CHARACTERS] + ["some words, and more words " * 40] * 3
    return Tokenizer.train(texts, 500)


def ids_of_the_library(tokenizer: Tokenizer, text: str) -> list[int]:
    library = HuggingFaceTokenizer.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    return library.encode(text, add_special_tokens=False).ids


@given(texts_of_runs)
@example("," + "a" * 256 + "é")  # a sign begins a pre-token of ASCII letters, which ends at another letter
@example(" " + "a" * 256)
@example("!" * 130 + "\n" * 130)
@example("\x1c\x00" * 200)
def test_no_long_piece_is_missed(text: str) -> None:
    longest = max((stop - start for _, (start, stop) in uncut().pre_tokenize_str(text)), default=0)
    assert may_have_long_pieces(text) or longest <= LONGEST_PIECE


@given(texts_of_runs)
def test_every_text_has_the_ids_of_the_library_and_comes_back(text: str) -> None:
    ids = trained().encode(text)
    assert ids == ids_of_the_library(trained(), text)
    assert trained().decode(ids) == text


def test_a_piece_is_cut_after_256_characters() -> None:
    tokenizer = Tokenizer.train(["A" * 4096], 300)
    longest = max(tokenizer.byte_lengths)
    assert longest == 256
    assert tokenizer.encode("A" * 1024) == [*tokenizer.encode("A" * 256)] * 4


def test_transformers_gives_the_same_ids() -> None:
    text = "a" * 1000 + " words 世" * 3 + "-" * 600 + "\n" * 300
    theirs = PreTrainedTokenizerFast(tokenizer_object=HuggingFaceTokenizer.from_str(trained().to_json()))
    assert theirs(text, add_special_tokens=False)["input_ids"] == trained().encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "Prose has a space after every word, and few words have more than twenty letters. " * 4,
        "中文没有空格，但是每句话都有标点符号。一个句子通常不超过五十个字，所以不会被切开。" * 10,
        "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAxMjM0NTY3ODk=" * 4,
        "    if value is None:\n        return [item for item in items if item.is_valid]\n" * 4,
    ],
)
def test_common_text_needs_no_second_look(text: str) -> None:
    assert not may_have_long_pieces(text)


@pytest.mark.parametrize("unit", ["A", "ACGT", "ab\u0301", "-", " "])
def test_training_on_a_long_run_is_linear(unit: str) -> None:
    """Uncut, 400,000 letters take more than a minute, and twice as many four times that."""
    text = unit * (400_000 // len(unit))
    start = time.process_time()
    Tokenizer.train([text], 300)
    assert time.process_time() - start < 5

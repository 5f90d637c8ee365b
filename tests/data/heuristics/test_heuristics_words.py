"""Chunks are split into words as by spaCy's English tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.heuristics.words import (
    MAX_CHUNK_CHARACTERS,
    has_letter,
    is_punctuation,
    is_symbol,
    split_chunk,
)

# The words of spacy.blank("en") of spaCy 3.8, joined by spaces; | separates the cases.
SPACY = """
hello ,|( word )|" quoted "|' single '|ok !|really ? !|end . "|word ...|... word|« mot »|été .|中文 。|— |a — b
do n't|do n’t|ca n't|can not|do nt|it 's|it ’s '|John 's|I 'm|I 'd|i d|its|we 'll|they 're|you 've|and/or
e.g.|i.e.|( e.g. ,|etc .|Mr.|U.S.|A.B.|J.|well - known|state - of - the - art|a / b|x , y|a ~ b|a&b|word . Next
3/4|10:30|1,000|3,4|1.5|1 - 2|2 - D|3 + 4|+1|+ x|1st|½|v1.2.3|C++|10 km|50 %|2 GB|$ 5.99|5 €|10 am
key : value|x = y|f(x )|foo_bar|_ foo|_ _ init _ _|foo.bar|os.path.join|-flag|--option|/usr / bin|@name|# tag
< tag >|[ 1 ]|{ x }|* bold *|➡|example.org/a-b|http://a.com/x_y|user@host.org
"""


@pytest.mark.parametrize("words", [case.split() for line in SPACY.split("\n") for case in line.split("|") if case])
def test_chunks_are_split_as_by_spacy(words):
    assert list(split_chunk("".join(words))) == words


@given(st.text(st.characters(exclude_categories=("Cs", "Zs", "Zl", "Zp", "Cc"))))
def test_no_character_is_lost(chunk):
    words = split_chunk(chunk)

    assert "".join(words) == chunk
    assert all(words)


@given(st.text(st.sampled_from("ab.A'’s-/:1%k,(~n_+$"), max_size=12))
def test_split_words_join_to_the_chunk(chunk):
    assert "".join(split_chunk(chunk)) == chunk


def test_very_long_chunks_are_not_split():
    assert len(split_chunk("a-" * (MAX_CHUNK_CHARACTERS // 2))) == MAX_CHUNK_CHARACTERS - 1
    assert split_chunk("a-" * MAX_CHUNK_CHARACTERS) == ("a-" * MAX_CHUNK_CHARACTERS,)


@pytest.mark.parametrize(
    ("word", "symbol", "letter", "punctuation"),
    [
        ("word", False, True, False),
        ("x1", False, True, False),
        ("12", False, False, False),
        ("...", True, False, True),
        ("$", True, False, False),
        ("•", True, False, True),
        ("中文", False, True, False),
    ],
)
def test_kinds_of_words(word, symbol, letter, punctuation):
    assert (is_symbol(word), has_letter(word), is_punctuation(word)) == (symbol, letter, punctuation)

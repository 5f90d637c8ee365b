"""Documents as sentences of words, the way the language models here see them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.quality.ngram_model import Int64s

NEW_LINE = "\n"
_DIGIT = re.compile(r"\d")
_TOKEN = re.compile(r"\w+|[^\w\s]|\n")
# Signs that mean the same: quotation marks, dashes, and the punctuation of full-width forms.
_PLAIN = dict(zip("“”„‟«»‘’‚‛′‐‑‒–—―−。、，：；！？（）", '""""""\'\'\'\'\'-------.,,:;!?()', strict=True))
_ODD = re.compile(f"[{''.join(_PLAIN)}]")


def tokens(text: str) -> list[str]:
    """Words, single signs of punctuation, and line breaks of a text; lower case, every digit a 0, plain quotes.

    What CCNet (Wenzek et al. 2020) does before it scores, less the removal of accents.
    """
    text = _DIGIT.sub("0", text.lower())
    if not text.isascii():
        text = _ODD.sub(lambda sign: _PLAIN[sign[0]], text)
    return _TOKEN.findall(text)


class Sentences(NamedTuple):
    """Lines that are not empty, one behind the other, as rows of words between those that begin and end them.

    `words` (int64 [n]), and for each of them the text that it is of: `text_of` (int64 [n], ascending).
    """

    words: Int64s
    text_of: Int64s


def sentences(rows: Iterable[int], sizes: Sequence[int], begin: int, end: int) -> Sentences:
    """From the rows of all tokens of texts with so many tokens each; that of `NEW_LINE` is -1."""
    text_of = np.repeat(np.arange(len(sizes)), sizes)
    words = np.fromiter(rows, np.int64, len(text_of))
    is_word = words >= 0
    words, text_of = words[is_word], text_of[is_word]
    line = np.cumsum(~is_word)[is_word]
    first = np.diff(line, prepend=-1) > 0
    first |= np.diff(text_of, prepend=-1) > 0
    starts = np.flatnonzero(first)
    places = np.arange(len(words)) + 2 * np.cumsum(first) - 1
    result = np.full(len(words) + 2 * len(starts), end, np.int64)
    result[places] = words
    result[places[starts] - 1] = begin
    lengths = np.diff(starts, append=len(words)) + 2
    return Sentences(result, np.repeat(text_of[starts], lengths))

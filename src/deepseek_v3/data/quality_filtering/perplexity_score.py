"""The perplexity of documents under an n-gram language model, computed as in CCNet (Wenzek et al. 2020).

The sentences of a model are the lines of documents. `tokenize` and `build_sentences` also prepare training data.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.arrays import Float64Array, Int64Array
from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.quality_filtering.ngram_model import BEGIN, END, UNKNOWN, NgramModel, read_arpa
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.optional import missing_library

NEW_LINE = "\n"
_DIGIT = re.compile(r"\d")
_TOKEN = re.compile(r"\w+|[^\w\s]|\n")
# Equivalents of quotation marks, dashes, and full-width punctuation in ASCII.
_PLAIN = dict(zip("“”„‟«»‘’‚‛′‐‑‒–—―−。、，：；！？（）", '""""""\'\'\'\'\'-------.,,:;!?()', strict=True))
_NOT_PLAIN = re.compile(f"[{''.join(_PLAIN)}]")
_KENLM_BINARY = b"mmap lm http://kheafield.com/code"


class Scores(NamedTuple):
    """The log10 probability of each text (float64), and its number of words and line ends (int64)."""

    log_probs: Float64Array
    counts: Int64Array


class LanguageModel(ABC):
    """A language model of the lines of documents."""

    @abstractmethod
    def scores(self, texts: Sequence[str]) -> Scores:
        """Computes the scores of texts; the score of a text depends on that text alone."""

    def perplexities(self, texts: Sequence[str]) -> Float64Array:
        """Computes 10^(-log10(probability) / n) for n words and line ends; infinity for a text without words."""
        found = [self.scores(chunk) for chunk in text_batches(texts)]
        log_probs = np.concatenate([np.zeros(0), *(scores.log_probs for scores in found)])
        counts = np.concatenate([np.zeros(0, np.int64), *(scores.counts for scores in found)])
        with np.errstate(over="ignore"):
            powers = np.power(10.0, -log_probs / np.maximum(counts, 1))
        return np.where(counts > 0, powers, np.inf)


@lru_cache(maxsize=4)
def load_language_model(path: Path) -> LanguageModel:
    """Loads a model from an ARPA file or a binary file of KenLM, once per process.

    Raises DataError if the file cannot be read, or if it is binary and the package kenlm is not installed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_KENLM_BINARY))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a language model") from None
    return KenlmModel(path) if start == _KENLM_BINARY else ArpaModel(read_arpa(path))


class ArpaModel(LanguageModel):
    """A model in memory, which takes about 16 bytes per n-gram."""

    def __init__(self, model: NgramModel) -> None:
        self._model = model
        self._rows = {**model.rows_of_words, NEW_LINE: -1}

    def scores(self, texts: Sequence[str]) -> Scores:
        """Scores all words of all texts at once."""
        lists = [tokenize(text) for text in texts]
        rows = map(self._rows.get, chain.from_iterable(lists), repeat(self._rows[UNKNOWN]))
        words, text_of = build_sentences(rows, [*map(len, lists)], self._rows[BEGIN], self._rows[END])
        scores = self._model.score(words)
        log_probs = np.bincount(text_of, scores, minlength=len(texts)).astype(np.float64)
        counts = np.bincount(text_of[words != self._rows[BEGIN]], minlength=len(texts))
        return Scores(log_probs, counts)


class KenlmModel(LanguageModel):
    """A model in KenLM's binary format, which KenLM maps into memory."""

    def __init__(self, path: Path) -> None:
        try:
            import kenlm
        except ImportError:
            advice = missing_library("a binary model", "kenlm", "use an ARPA file (kenlm needs a C++ compiler)")
            raise DataError(f"{path}: {advice}") from None
        try:
            self._model = kenlm.Model(str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read by kenlm: {error}; build it again with build_binary") from None

    def scores(self, texts: Sequence[str]) -> Scores:
        """Scores the texts line by line."""
        found = [self._score(tokenize(text)) for text in texts]
        log_probs = np.array([score for score, _ in found], np.float64)
        return Scores(log_probs, np.array([count for _, count in found], np.int64))

    def _score(self, words: list[str]) -> tuple[float, int]:
        lines = [" ".join(line) for is_line, line in groupby(words, NEW_LINE.__ne__) if is_line]
        return sum(map(self._model.score, lines)), sum(line.count(" ") + 2 for line in lines)


def tokenize(text: str) -> list[str]:
    """Splits a text into words, single punctuation marks and line breaks.

    The text is normalized as in CCNet (Wenzek et al. 2020): to lower case, with 0 for every digit and ASCII quotes
    and dashes. Unlike CCNet, this keeps accents.
    """
    text = _DIGIT.sub("0", text.lower())
    if not text.isascii():
        text = _NOT_PLAIN.sub(lambda sign: _PLAIN[sign[0]], text)
    return _TOKEN.findall(text)


class Sentences(NamedTuple):
    """The lines of texts that are not empty, concatenated.

    `words` (int64 [n]) holds the rows of words; each line starts with `BEGIN` and finishes with `END`. `text_of`
    (int64 [n], ascending) is the text of each word.
    """

    words: Int64Array
    text_of: Int64Array


def build_sentences(rows: Iterable[int], sizes: Sequence[int], begin: int, end: int) -> Sentences:
    """Builds the sentences of texts from the rows of all their tokens; -1 means `NEW_LINE`.

    Text i has `sizes[i]` tokens. `begin` and `end` are the rows of `BEGIN` and `END`.
    """
    text_of = np.repeat(np.arange(len(sizes)), sizes)
    words = np.fromiter(rows, np.int64, len(text_of))
    is_word = words >= 0
    words, text_of = words[is_word], text_of[is_word]
    line = np.cumsum(~is_word)[is_word]
    first = np.diff(line, prepend=-1) > 0
    first |= np.diff(text_of, prepend=-1) > 0
    starts = np.flatnonzero(first)
    positions = np.arange(len(words)) + 2 * np.cumsum(first) - 1
    result = np.full(len(words) + 2 * len(starts), end, np.int64)
    result[positions] = words
    result[positions[starts] - 1] = begin
    lengths = np.diff(starts, append=len(words)) + 2
    return Sentences(result, np.repeat(text_of[starts], lengths))

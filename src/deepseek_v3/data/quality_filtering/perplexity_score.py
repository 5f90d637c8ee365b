"""How well a language model foresees documents: their perplexity, as CCNet (Wenzek et al. 2020) takes it.

FOLDED: Documents as sentences of words, the way the language models here see them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_v3.data.arrays import Float64Array, Int64Array
from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.quality_filtering.ngram_model import BEGIN, END, UNKNOWN, NgramModel, read_arpa
from deepseek_v3.utils.errors import DataError

NEW_LINE = "\n"
_DIGIT = re.compile(r"\d")
_TOKEN = re.compile(r"\w+|[^\w\s]|\n")
# Signs that mean the same: quotation marks, dashes, and the punctuation of full-width forms.
_PLAIN = dict(zip("“”„‟«»‘’‚‛′‐‑‒–—―−。、，：；！？（）", '""""""\'\'\'\'\'-------.,,:;!?()', strict=True))
_ODD = re.compile(f"[{''.join(_PLAIN)}]")


def tokenize(text: str) -> list[str]:
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

    words: Int64Array
    text_of: Int64Array


def build_sentences(rows: Iterable[int], sizes: Sequence[int], begin: int, end: int) -> Sentences:
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


_KENLM_BINARY = b"mmap lm http://kheafield.com/code"


class Scores(NamedTuple):
    """For each text its log10 probability (float64), and the number of words and ends of lines in it (int64)."""

    log_probs: Float64Array
    counts: Int64Array


class LanguageModel(ABC):
    """A model of the lines of documents."""

    @abstractmethod
    def scores(self, texts: Sequence[str]) -> Scores:
        """The scores of texts, each of which depends on that text alone."""

    def perplexities(self, texts: Sequence[str]) -> Float64Array:
        """10 to the power of -log10(probability) per word or end of line; infinite for a text without words."""
        found = [self.scores(chunk) for chunk in text_batches(texts)]
        log_probs = np.concatenate([np.zeros(0), *(scores.log_probs for scores in found)])
        counts = np.concatenate([np.zeros(0, np.int64), *(scores.counts for scores in found)])
        with np.errstate(over="ignore"):
            powers = np.power(10.0, -log_probs / np.maximum(counts, 1))
        return np.where(counts > 0, powers, np.inf)


@lru_cache(maxsize=4)
def load_language_model(path: Path) -> LanguageModel:
    """The model in an ARPA file or a binary file of KenLM, read once per process.

    Raises DataError where the file cannot be read, or is binary and the package kenlm is not installed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_KENLM_BINARY))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a language model") from None
    return KenlmModel(path) if start == _KENLM_BINARY else ArpaModel(read_arpa(path))


class ArpaModel(LanguageModel):
    """A model in memory, about 16 bytes for each n-gram."""

    def __init__(self, model: NgramModel) -> None:
        self._model = model
        self._rows = {**model.rows_of_words, NEW_LINE: -1}

    def scores(self, texts: Sequence[str]) -> Scores:
        """Looks up all words of all texts at once."""
        lists = [tokenize(text) for text in texts]
        rows = map(self._rows.get, chain.from_iterable(lists), repeat(self._rows[UNKNOWN]))
        words, text_of = build_sentences(rows, [*map(len, lists)], self._rows[BEGIN], self._rows[END])
        scores = self._model.score(words)
        log_probs = np.bincount(text_of, scores, minlength=len(texts)).astype(np.float64)
        counts = np.bincount(text_of[words != self._rows[BEGIN]], minlength=len(texts))
        return Scores(log_probs, counts)


class KenlmModel(LanguageModel):
    """A model in KenLM's binary format, which maps it into memory."""

    def __init__(self, path: Path) -> None:
        kenlm = _kenlm(path)
        try:
            self._model = kenlm.Model(str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read by kenlm: {error}; build it anew with build_binary") from None

    def scores(self, texts: Sequence[str]) -> Scores:
        """Scores line by line."""
        found = [self._score(tokenize(text)) for text in texts]
        log_probs = np.array([score for score, _ in found], np.float64)
        return Scores(log_probs, np.array([count for _, count in found], np.int64))

    def _score(self, words: list[str]) -> tuple[float, int]:
        lines = [" ".join(line) for is_line, line in groupby(words, NEW_LINE.__ne__) if is_line]
        return sum(map(self._model.score, lines)), sum(line.count(" ") + 2 for line in lines)


def _kenlm(path: Path) -> Any:
    try:
        return import_module("kenlm")
    except ImportError:
        raise DataError(
            f"{path}: is a binary model of KenLM, and the package kenlm is not installed; run "
            "`pip install 'deepseek_v3[kenlm]'` (which needs a C++ compiler), or name an ARPA file"
        ) from None

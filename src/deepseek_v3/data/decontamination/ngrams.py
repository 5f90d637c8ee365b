"""N-grams of words as numbers of 64 bits, for many texts at once."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

# Scripts without spaces between words, in which each character counts as one.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, CJK ideographs
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

_FACTOR = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_INVERSE = pow(_FACTOR, -1, 2**64)


def words(lower: str) -> list[str]:
    """The runs of letters and digits of a text in lower case."""
    return word_pattern(lower).findall(lower)


def word_pattern(lower: str) -> re.Pattern[str]:
    """What matches each of the words of a text in lower case."""
    return _ASCII_WORD if lower.isascii() else _WORD


class NgramHashes:
    """The hashes of all n-grams of words, for any n: equal ones for equal words, wherever they stand."""

    def __init__(self, values: UInt64s) -> None:
        """From a random number for each word: uint64 [words]."""
        powers = np.multiply.accumulate(np.full(len(values), _FACTOR, np.uint64))
        self._inverse = np.multiply.accumulate(np.full(len(values), _INVERSE, np.uint64))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])

    def at(self, starts: Int64s, n: int | Int64s) -> UInt64s:
        """The hashes of the n-grams that begin at these words; n may be one for each."""
        return (self._sums[starts + n] - self._sums[starts]) * self._inverse[starts]

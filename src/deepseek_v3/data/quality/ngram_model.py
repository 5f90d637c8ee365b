"""N-gram language models with back-off (Katz 1987): sorted tables, and the scores of many sentences at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.sorted_keys import find_sorted

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Float64s = NDArray[np.float64]

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class NgramModel:
    """A model of order `len(log_probs)`.

    An n-gram is known by its row among those of its length. The row of a word is its index in `words`, which hold
    `UNKNOWN`, `BEGIN` and `END`. The n-grams of length k have ascending `keys[k - 2]` (int64): the row of their
    first k - 1 words times len(words), plus the row of the last word. `log_probs[k - 1]` and `backoffs[k - 1]`, the
    latter but for the longest, are logarithms to base 10 (float32).
    """

    words: list[str]
    keys: list[Int64s]
    log_probs: list[Floats]
    backoffs: list[Floats]

    @cached_property
    def rows_of_words(self) -> dict[str, int]:
        """The row of each word."""
        return {word: row for row, word in enumerate(self.words)}

    def find(self, length: int, contexts: Int64s, words: Int64s) -> Int64s:
        """Rows of n-grams of a length from 2 on, given their contexts' rows and last words; -1 where there is none.

        A context of -1 stands for none.
        """
        found = np.full(len(words), -1, np.int64)
        asked = np.flatnonzero(contexts >= 0)
        found[asked] = find_sorted(self.keys[length - 2], contexts[asked] * len(self.words) + words[asked])
        return found

    def score(self, words: Int64s) -> Float64s:
        """The log10 probability of each word of sentences that stand one behind the other; 0 for each `BEGIN`.

        `words` are rows (int64 [n]); every sentence starts with that of `BEGIN`.
        """
        begins = words == self.rows_of_words[BEGIN]
        scores = self.log_probs[0][words].astype(np.float64)
        rows = words
        for length in range(2, len(self.log_probs) + 1):
            contexts = before(rows, begins)
            known = contexts >= 0
            scores[known] += self.backoffs[length - 2][contexts[known]]
            rows = self.find(length, contexts, words)
            scores[rows >= 0] = self.log_probs[length - 1][rows[rows >= 0]]
        scores[begins] = 0
        return scores


def before(rows: Int64s, begins: NDArray[np.bool_]) -> Int64s:
    """For each word the row that belongs to the word before it; -1 where a sentence begins, as with the first."""
    shifted = np.roll(rows, 1)
    shifted[begins] = -1
    return shifted

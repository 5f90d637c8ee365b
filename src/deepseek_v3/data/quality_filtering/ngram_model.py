"""N-gram language models with back-off (Katz 1987): sorted tables, and the scores of many sentences at once.

FOLDED: The ARPA format of n-gram models, as SRILM and KenLM read and write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deepseek_v3.data.arrays import BoolArray, Float32Array, Float64Array, Int64Array, find_sorted
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

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
    keys: list[Int64Array]
    log_probs: list[Float32Array]
    backoffs: list[Float32Array]

    @cached_property
    def rows_of_words(self) -> dict[str, int]:
        """The row of each word."""
        return {word: row for row, word in enumerate(self.words)}

    def find(self, length: int, contexts: Int64Array, words: Int64Array) -> Int64Array:
        """Rows of n-grams of a length from 2 on, given their contexts' rows and last words; -1 where there is none.

        A context of -1 stands for none.
        """
        found = np.full(len(words), -1, np.int64)
        asked = np.flatnonzero(contexts >= 0)
        found[asked] = find_sorted(self.keys[length - 2], contexts[asked] * len(self.words) + words[asked])
        return found

    def score(self, words: Int64Array) -> Float64Array:
        """The log10 probability of each word of sentences that stand one behind the other; 0 for each `BEGIN`.

        `words` are rows (int64 [n]); every sentence starts with that of `BEGIN`.
        """
        begins = words == self.rows_of_words[BEGIN]
        scores = self.log_probs[0][words].astype(np.float64)
        rows = words
        for length in range(2, len(self.log_probs) + 1):
            contexts = previous_rows(rows, begins)
            known = contexts >= 0
            scores[known] += self.backoffs[length - 2][contexts[known]]
            rows = self.find(length, contexts, words)
            scores[rows >= 0] = self.log_probs[length - 1][rows[rows >= 0]]
        scores[begins] = 0
        return scores


def previous_rows(rows: Int64Array, begins: BoolArray) -> Int64Array:
    """For each word the row that belongs to the word before it; -1 where a sentence begins, as with the first."""
    shifted = np.roll(rows, 1)
    shifted[begins] = -1
    return shifted


_COUNT = re.compile(rb"ngram (\d+)\s*=\s*(\d+)\s*")
_UNKNOWN, _OLD_UNKNOWN = UNKNOWN.encode(), b"<UNK>"
_MISSING_UNKNOWN = -100.0  # what KenLM takes for the probability of unknown words where a model has none


def read_arpa(path: Path) -> NgramModel:
    """Reads a model. Raises DataError, naming the line, where the file cannot be read or is no such model."""
    try:
        with path.open("rb") as file:
            return _ArpaReader(path, file).model()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a language model") from None


def write_arpa(model: NgramModel, path: Path) -> None:
    """Writes a model."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {k}={len(rows)}\n" for k, rows in enumerate(model.log_probs, start=1))
        ngrams = model.words
        for length, log_probs in enumerate(model.log_probs, start=1):
            file.write(f"\n\\{length}-grams:\n")
            if length > 1:
                contexts, last = np.divmod(model.keys[length - 2], len(model.words))
                pairs = zip(contexts.tolist(), last.tolist(), strict=True)
                ngrams = [f"{ngrams[context]} {model.words[word]}" for context, word in pairs]
            rows = zip(log_probs.tolist(), ngrams, strict=True)
            if length <= len(model.backoffs):
                backoffs = model.backoffs[length - 1].tolist()
                file.writelines(
                    f"{log_prob:.7g}\t{ngram}\t{backoff:.7g}\n"
                    for (log_prob, ngram), backoff in zip(rows, backoffs, strict=True)
                )
            else:
                file.writelines(f"{log_prob:.7g}\t{ngram}\n" for log_prob, ngram in rows)
        file.write("\n\\end\\\n")


class _ArpaReader:
    """Reads a model line by line."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._line = 0
        self._model = NgramModel([], [], [], [])
        self._rows: dict[bytes, int] = {}  # of the words

    def model(self) -> NgramModel:
        counts = self._counts()
        for length, count in enumerate(counts, start=1):
            self._expect(f"\\{length}-grams:".encode())
            self._section(length, count, length == len(counts))
        self._expect(b"\\end\\")
        return self._model

    def _counts(self) -> list[int]:
        self._expect(b"\\data\\")
        counts: list[int] = []
        while match := _COUNT.fullmatch(line := self._next()):
            if int(match[1]) != len(counts) + 1:
                raise self._error(f"expected the number of {len(counts) + 1}-grams, found {line!r}")
            counts.append(int(match[2]))
        if not counts:
            raise self._error(f"expected a line such as 'ngram 1=1000', found {line!r}")
        return counts

    def _section(self, length: int, count: int, longest: bool) -> None:
        log_probs: list[float] = []
        backoffs: list[float] = []
        words: list[bytes] = []
        for line in islice(self._file, count):
            self._line += 1
            fields = line.split()
            try:
                log_probs.append(float(fields[0]))
                words.append(fields[length])  # there are so many
                backoffs.append(float(fields[length + 1]) if len(fields) > length + 1 else 0.0)
            except (ValueError, IndexError):
                raise self._error(f"expected a log10 probability and {length} words, found {line!r}") from None
            words[-1:] = fields[1 : length + 1]
        if len(log_probs) < count:
            raise self._error(f"the file ends after {len(log_probs)} of {count} {length}-grams")
        if length == 1 and not {_UNKNOWN, _OLD_UNKNOWN} & {*words}:
            words.append(_UNKNOWN)
            log_probs.append(_MISSING_UNKNOWN)
            backoffs.append(0.0)
        order = self._add_words(words) if length == 1 else self._add_keys(length, words)
        self._model.log_probs.append(np.array(log_probs, np.float32)[order])
        if not longest:
            self._model.backoffs.append(np.array(backoffs, np.float32)[order])

    def _add_words(self, words: list[bytes]) -> Int64Array:
        """Takes over the words; they stay in their order."""
        self._rows = {word: row for row, word in enumerate(words)}
        if not {BEGIN.encode(), END.encode()} <= self._rows.keys() or len(self._rows) < len(words):
            raise self._error(f"a word stands twice, or there is no {BEGIN} or {END}")
        names = [UNKNOWN if word == _OLD_UNKNOWN else word.decode("utf-8", "replace") for word in words]
        self._model.words.extend(names)
        return np.arange(len(words))

    def _add_keys(self, length: int, words: list[bytes]) -> Int64Array:
        """Takes over the keys of n-grams; returns the order in which they ascend."""
        rows = np.array([self._rows.get(word, -1) for word in words], np.int64).reshape(-1, length)
        contexts = rows[:, 0]
        for place in range(1, length - 1):
            contexts = self._model.find(place + 1, contexts, rows[:, place])
        missing = np.flatnonzero((contexts < 0) | (rows[:, -1] < 0))
        if len(missing):
            self._line += int(missing[0]) + 1 - len(rows)
            raise self._error("a word of the n-gram, or all of it but the last word, is not listed before it")
        keys = contexts * len(self._model.words) + rows[:, -1]
        order = np.argsort(keys, kind="stable")
        self._model.keys.append(keys[order])
        return order

    def _next(self) -> bytes:
        """The next line; an empty one only at the end of a block, b'' at the end of the file."""
        self._line += 1
        return self._file.readline()

    def _expect(self, heading: bytes) -> None:
        line = self._next()
        while line and not line.strip():
            line = self._next()
        if line.strip() != heading:
            raise self._error(f"expected {heading.decode()}, found {line!r}")

    def _error(self, problem: str) -> DataError:
        return DataError(
            f"{self._path}:{self._line}: is no ARPA model: {problem}; write it anew, with "
            "`dsv3 quality train --text` or lmplz"
        )

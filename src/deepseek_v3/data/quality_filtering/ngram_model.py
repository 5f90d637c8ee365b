"""N-gram language models with back-off (Katz 1987) as sorted arrays, and their files in the ARPA format.

SRILM and KenLM read and write the same files.
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
_UNKNOWN, _OLD_UNKNOWN = UNKNOWN.encode(), b"<UNK>"
_MISSING_UNKNOWN = -100.0  # KenLM's log10 probability of unknown words if a model has none
_COUNT = re.compile(rb"ngram (\d+)\s*=\s*(\d+)\s*")


@dataclass(frozen=True)
class NgramModel:
    """A model of order `len(log_probs)`.

    Each n-gram is identified by its row among the n-grams of its length. The row of a word is its index in `words`,
    which include `UNKNOWN`, `BEGIN` and `END`. The n-grams of length k > 1 have ascending keys, `keys[k - 2]`
    (int64): the row of the first k - 1 words, times len(words), plus the row of the last word. `log_probs[k - 1]`
    and `backoffs[k - 1]` (float32) are logarithms to base 10; the longest n-grams have no back-offs.
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
        """Returns the rows of n-grams of `length` ≥ 2 words, or -1 for n-grams that the model does not have.

        `contexts` are the rows of all but the last word (-1 for none), `words` the rows of the last words.
        """
        found = np.full(len(words), -1, np.int64)
        known = np.flatnonzero(contexts >= 0)
        found[known] = find_sorted(self.keys[length - 2], contexts[known] * len(self.words) + words[known])
        return found

    def score(self, words: Int64Array) -> Float64Array:
        """Returns the log10 probability of each word of concatenated sentences; 0 for each `BEGIN`.

        `words` are rows (int64 [n]); every sentence starts with the row of `BEGIN`.
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
    """Returns the row of the previous word of each word; -1 for the first word of a sentence."""
    shifted = np.roll(rows, 1)
    shifted[begins] = -1
    return shifted


def read_arpa(path: Path) -> NgramModel:
    """Reads a model from an ARPA file.

    Raises DataError if the file cannot be read, or, naming the line, if it is not in this format.
    """
    try:
        with path.open("rb") as file:
            return _ArpaReader(path, file).model()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a language model") from None


def write_arpa(model: NgramModel, path: Path) -> None:
    """Writes a model to an ARPA file."""
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
    """Reads an ARPA file line by line."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._line = 0
        self._model = NgramModel([], [], [], [])
        self._rows: dict[bytes, int] = {}  # row of each word

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
                words.append(fields[length])  # raises IndexError if there are fewer words
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
        """Adds the words to the model, and returns their order, which is unchanged."""
        self._rows = {word: row for row, word in enumerate(words)}
        if not {BEGIN.encode(), END.encode()} <= self._rows.keys() or len(self._rows) < len(words):
            raise self._error(f"a word is listed twice, or there is no {BEGIN} or {END}")
        names = [UNKNOWN if word == _OLD_UNKNOWN else word.decode("utf-8", "replace") for word in words]
        self._model.words.extend(names)
        return np.arange(len(words))

    def _add_keys(self, length: int, words: list[bytes]) -> Int64Array:
        """Adds the keys of n-grams to the model in ascending order, and returns that order."""
        rows = np.array([self._rows.get(word, -1) for word in words], np.int64).reshape(-1, length)
        contexts = rows[:, 0]
        for position in range(1, length - 1):
            contexts = self._model.find(position + 1, contexts, rows[:, position])
        missing = np.flatnonzero((contexts < 0) | (rows[:, -1] < 0))
        if len(missing):
            self._line += int(missing[0]) + 1 - len(rows)
            raise self._error("a word of the n-gram, or all of it but the last word, is not listed before it")
        keys = contexts * len(self._model.words) + rows[:, -1]
        order = np.argsort(keys, kind="stable")
        self._model.keys.append(keys[order])
        return order

    def _next(self) -> bytes:
        """Returns the next line, or b'' at the end of the file."""
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
            f"{self._path}:{self._line}: is not an ARPA model: {problem}; write it again, with "
            "`dsv3 quality train --text` or lmplz"
        )

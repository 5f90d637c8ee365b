"""Supervised fastText models (Joulin et al. 2016), applied to many texts at once in NumPy.

Labels and scores equal those of fastText's own code. The compiled fastText packages are not used, because several
forks install the same module and overwrite each other. Character n-grams are hashed by FNV-1a, word n-grams by
polynomials of word hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import expit

from deepseek_v3.data.arrays import BoolArray, Float32Array, Int64Array, UInt32Array, UInt64Array
from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.quality_filtering.fasttext_format import LABEL, FastTextFile
from deepseek_v3.utils.errors import DataError

END_OF_LINE = b"</s>"  # a word without character n-grams
_EPSILON = 1e-5  # fastText adds it to probabilities before taking their logarithm
_FNV_OFFSET, _FNV_PRIME = 2166136261, 16777619
_WORD_FACTOR = np.uint64(116049371)


@lru_cache(maxsize=4)
def load_fasttext(path: Path) -> FastText:
    """Loads a model from a file, once per process. Raises DataError as `FastTextFile.read` does."""
    return FastText(FastTextFile.read(path), path)


class FastText:
    """A supervised model that is applied to texts. `path` names the model in errors."""

    def __init__(self, model: FastTextFile, path: Path) -> None:
        self._model = model
        self._path = path
        self.labels: list[str] = model.labels
        self._rows_of_buckets: Int64Array | None = None
        if model.bucket_rows is not None:
            self._rows_of_buckets = np.full(model.buckets, -1, np.int64)
            self._rows_of_buckets[[*model.bucket_rows]] = [*model.bucket_rows.values()]
        self._tree = _HuffmanTree(model.label_counts) if model.loss == "hs" else None

    def index(self, label: str) -> int:
        """Returns the column of a label. Raises DataError if the model has no such label."""
        if label not in self.labels:
            known = ", ".join(self.labels[:200])
            raise DataError(f"{self._path}: has no label {label!r}, only {known}; name one of them")
        return self.labels.index(label)

    def probabilities(self, texts: Sequence[str]) -> Float32Array:
        """Computes the probabilities of all labels: float32 [texts, labels].

        Line breaks count as spaces. The probabilities of a text depend on that text alone, and are zero if the
        model knows none of its words and n-grams.
        """
        found = [self._output(self._hidden(chunk)) for chunk in text_batches(texts)]
        return np.concatenate(found) if found else np.zeros((0, len(self.labels)), np.float32)

    def _hidden(self, texts: Sequence[str]) -> tuple[Float32Array, Int64Array]:
        """Returns the mean vector of all words and n-grams of each text, and their number."""
        lines = [split_words(text) for text in texts]
        numbers: defaultdict[bytes, int] = defaultdict(count().__next__)
        tokens = np.fromiter(map(numbers.__getitem__, chain.from_iterable(lines)), np.int64)
        starts = np.concatenate([[0], np.cumsum([*map(len, lines)])])
        vectors, sizes = self._word_vectors([*numbers])
        totals = sum_vectors(vectors, tokens, starts)
        counts = np.diff(np.concatenate([[0], np.cumsum(sizes[tokens])])[starts])
        if self._model.word_ngrams > 1:
            hashes, line_of = word_ngrams(word_hashes([*numbers])[tokens], starts, self._model.word_ngrams)
            self._add_buckets(totals, counts, hashes % np.uint64(self._model.buckets), line_of)
        return totals / np.maximum(counts, 1)[:, None].astype(np.float32), counts

    def _word_vectors(self, words: list[bytes]) -> tuple[Float32Array, Int64Array]:
        """Returns the sum of the vectors of each word and of its character n-grams, and their number."""
        known = np.array([self._model.words.get(word, -1) for word in words], np.int64)
        found = np.flatnonzero(known >= 0)
        totals = np.zeros((len(words), self._model.input.shape[1]), np.float32)
        totals[found] = self._model.input[known[found]]
        counts = (known >= 0).astype(np.int64)
        if self._model.max_characters > 0:
            shortest, longest = self._model.min_characters, self._model.max_characters
            for hashes, word_of in character_ngrams(words, shortest, longest):
                self._add_buckets(totals, counts, hashes % np.uint32(self._model.buckets), word_of)
        return totals, counts

    def _add_buckets(
        self, totals: Float32Array, counts: Int64Array, buckets: NDArray[np.unsignedinteger], owner: Int64Array
    ) -> None:
        """Adds the vector of each bucket to the total of its owner; owners are in ascending order."""
        rows = buckets.astype(np.int64)
        if self._rows_of_buckets is not None:
            rows = self._rows_of_buckets[rows]
            rows, owner = rows[rows >= 0], owner[rows >= 0]
        sizes = np.bincount(owner, minlength=len(totals))
        vectors = self._model.input[len(self._model.words) + rows]
        totals += sum_vectors(vectors, np.arange(len(rows)), np.concatenate([[0], np.cumsum(sizes)]))
        counts += sizes

    def _output(self, hidden: tuple[Float32Array, Int64Array]) -> Float32Array:
        means, counts = hidden
        # One small product per text: the rounding of a single large product would depend on the number of texts.
        logits = np.matmul(means[:, None, :], self._model.output.T)[:, 0, :]
        if self._tree is not None:
            result = self._tree.probabilities(logits)
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            result = powers / powers.sum(axis=1, keepdims=True) + np.float32(_EPSILON)
        result[counts == 0] = 0
        return np.minimum(result, 1)


class _HuffmanTree:
    """Hierarchical softmax: a label's probability is the product of the branch probabilities on its path."""

    def __init__(self, label_counts: Sequence[int]) -> None:
        """Builds fastText's Huffman tree from the label counts, which are in descending order."""
        labels = len(label_counts)
        counts = [*label_counts] + [10**15] * (labels - 1)
        leaf, node = labels - 1, labels
        self._children: list[tuple[int, int]] = []
        for parent in range(labels, 2 * labels - 1):
            pair = []
            for _ in range(2):
                take_leaf = leaf >= 0 and counts[leaf] < counts[node]
                pair.append(leaf if take_leaf else node)
                leaf, node = (leaf - 1, node) if take_leaf else (leaf, node + 1)
            counts[parent] = counts[pair[0]] + counts[pair[1]]
            self._children.append((pair[0], pair[1]))
        self._labels = labels

    def probabilities(self, logits: Float32Array) -> Float32Array:
        """Computes label probabilities from the logits of the inner nodes: both are float32 [texts, labels].

        The last column of the logits is unused, since the tree has one inner node less than labels.
        """
        right = expit(logits)
        logs = np.zeros((len(logits), 2 * self._labels - 1), np.float32)
        for inner in reversed(range(self._labels - 1)):
            first, second = self._children[inner]
            above = logs[:, self._labels + inner]
            logs[:, first] = above + np.log(1 - right[:, inner] + np.float32(_EPSILON))
            logs[:, second] = above + np.log(right[:, inner] + np.float32(_EPSILON))
        return np.exp(logs[:, : self._labels])


def split_words(text: str) -> list[bytes]:
    """Splits a text into the words that fastText reads from one line; the last one marks the end of the line."""
    words = text.encode("utf-8").replace(b"\0", b" ").split()
    if END_OF_LINE in words:
        words = words[: words.index(END_OF_LINE)]
    if LABEL in text:
        words = [word for word in words if not word.startswith(LABEL.encode())]
    return [*words, END_OF_LINE]


def sum_vectors(vectors: Float32Array, chosen: Int64Array, starts: Int64Array) -> Float32Array:
    """Sums chosen rows of `vectors` by segment: float32 [segments, width].

    Segment i sums the rows chosen[starts[i] : starts[i + 1]].
    """
    ones = np.ones(len(chosen), np.float32)
    return csr_matrix((ones, chosen, starts), (len(starts) - 1, len(vectors))) @ vectors


def word_hash(word: bytes) -> int:
    """Computes the 32-bit FNV-1a hash as fastText does, which sign-extends bytes from 128 on."""
    value = _FNV_OFFSET
    for byte in word:
        value = (value ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * _FNV_PRIME & 0xFFFFFFFF
    return value


def word_hashes(words: Sequence[bytes]) -> UInt64Array:
    """Returns the word hashes that `word_ngrams` takes: signed 32-bit numbers, extended to uint64 [words]."""
    return np.array([*map(word_hash, words)], np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


def word_ngrams(hashes: UInt64Array, starts: Int64Array, longest: int) -> tuple[UInt64Array, Int64Array]:
    """Hashes all n-grams of 2 to `longest` words; also returns the line of each, in ascending order.

    `hashes` (uint64 [words]) are the hashes of the words; line i has the words from starts[i] to starts[i + 1] - 1.
    """
    line_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    last = starts[1:][line_of]
    found: list[UInt64Array] = []
    owners: list[Int64Array] = []
    begins = np.arange(len(hashes))
    values = hashes
    for n in range(2, longest + 1):
        inside = begins + n <= last[begins]
        begins = begins[inside]
        values = values[inside] * _WORD_FACTOR + hashes[begins + n - 1]
        found.append(values)
        owners.append(line_of[begins])
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(found)[order], owner[order]


def character_ngrams(
    words: Sequence[bytes], shortest: int, longest: int
) -> Iterator[tuple[UInt32Array, Int64Array]]:
    """Yields, for each n from `shortest` to `longest`, the hashes of all n-grams of n characters, and their words.

    N-grams are taken from `<word>`; the two brackets alone are not n-grams.
    """
    marked = [b"" if word == END_OF_LINE else b"<" + word + b">" for word in words]
    data = np.frombuffer(b"".join(marked), np.uint8)
    begins = np.flatnonzero((data & 0xC0) != 0x80)
    sizes = np.diff(begins, append=len(data))
    word_of = np.repeat(np.arange(len(words)), [*map(len, marked)])[begins]
    signed = data.view(np.int8).astype(np.int32).view(np.uint32)

    first: Int64Array = np.arange(len(begins))
    values: UInt32Array = np.full(len(begins), _FNV_OFFSET, np.uint32)
    for n in range(1, longest + 1):
        inside = first + n <= len(begins)
        first, values = first[inside], values[inside]
        last = first + n - 1
        inside = word_of[last] == word_of[first]
        first, values, last = first[inside], values[inside], last[inside]
        values = (values ^ signed[begins[last]]) * np.uint32(_FNV_PRIME)
        for byte in range(1, int(sizes.max(initial=1))):
            longer = np.flatnonzero(sizes[last] > byte)
            values[longer] = (values[longer] ^ signed[begins[last[longer]] + byte]) * np.uint32(_FNV_PRIME)
        if n >= shortest:
            chosen = _is_inside_word(word_of, first) if n == 1 else slice(None)
            yield values[chosen], word_of[first[chosen]]


def _is_inside_word(word_of: Int64Array, characters: Int64Array) -> BoolArray:
    """Marks the characters that are neither the first nor the last of their word."""
    change = np.flatnonzero(np.diff(word_of)) + 1
    inner = np.ones(len(word_of), np.bool_)
    inner[np.concatenate([[0], change, change - 1, [len(word_of) - 1]])] = False
    return inner[characters]

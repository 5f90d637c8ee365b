"""All pairs of near duplicates in a corpus, exactly: `python benchmarks/exact_pairs.py FOLDER`.

Two documents are near duplicates if their sets of five consecutive words have a Jaccard similarity of at least 0.8;
words.py defines the words. Nothing is hashed and nothing is estimated. The script writes two files beside the
corpus: `pairs.npy` has the documents of each pair, int64 [pairs, 2], counted from 0 in the order of the corpus, the
smaller number first, sorted; `similarities.npy` has their similarities, float64 [pairs].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import typer
from corpus import read_corpus
from numpy.typing import NDArray
from scipy import sparse
from words import words_of

from deepseek_v3.utils.command_line import run_command

THRESHOLD = 0.8
SHINGLE = 5

Int64Array: TypeAlias = NDArray[np.int64]
Float64Array: TypeAlias = NDArray[np.float64]

_CANDIDATES = 2**16  # pairs that are compared at a time
_WAITING = 2**26  # pairs, with repeats, that are collected before they are sorted


def main(
    folder: Annotated[Path, typer.Argument(help="What corpus.py wrote.")],
    threshold: Annotated[float, typer.Option(min=0.01, max=1.0, help="Least similarity of a pair.")] = THRESHOLD,
) -> None:
    """Find every pair of near duplicates in a corpus."""
    pairs, similarities = similar_pairs((document.text for document in read_corpus(folder)), threshold)
    np.save(folder / "pairs.npy", pairs)
    np.save(folder / "similarities.npy", similarities)
    typer.echo(f"{len(pairs):,} pairs of a similarity of {threshold} or more")


def similar_pairs(texts: Iterable[str], threshold: float = THRESHOLD) -> tuple[Int64Array, Float64Array]:
    """The pairs of texts that are at least as similar as `threshold`, int64 [pairs, 2], and their similarities."""
    documents, shingles = shingle_sets(texts)
    matrix = _rarest_first(documents, shingles)
    sizes = np.diff(matrix.indptr).astype(np.int64)
    found, similarities = [], []
    for first, second in _candidates(matrix, sizes, threshold):
        both = np.asarray(matrix[first].multiply(matrix[second]).sum(axis=1), np.int64).ravel()
        similarity = both / (sizes[first] + sizes[second] - both)
        alike = similarity >= threshold
        found.append(np.stack([first[alike], second[alike]], axis=1))
        similarities.append(similarity[alike])
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], np.concatenate([np.empty(0), *similarities])[order]


def shingle_sets(texts: Iterable[str]) -> tuple[Int64Array, Int64Array]:
    """The different (document, shingle) pairs, sorted: two arrays of the same length.

    Shingles are numbered step by step: pairs of words, then pairs of these pairs, then these with the fifth word. A
    text of fewer than five words has one shingle of all its words; a text without words has none.
    """
    words, starts = _numbered_words(texts)
    documents = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    twos = _numbered(words[:-1], words[1:])
    fours = _numbered(twos[:-2], twos[2:])
    fives = _numbered(fours[:-1], words[SHINGLE - 1 :])
    inside = documents[: len(fives)] == documents[SHINGLE - 1 :]
    return _once(documents[: len(fives)][inside], fives[inside])


def _numbered_words(texts: Iterable[str]) -> tuple[Int64Array, Int64Array]:
    """All words of all texts as numbers, and where each text starts; short texts are padded with 0."""
    numbers: dict[str, int] = {}
    words: list[NDArray[np.int32]] = []
    starts = [0]
    for text in texts:
        found = [numbers.setdefault(word, len(numbers) + 1) for word in words_of(text)]
        found += [0] * (SHINGLE - len(found)) if found else []
        words.append(np.array(found, np.int32))
        starts.append(starts[-1] + len(found))
    return np.concatenate([np.zeros(0, np.int32), *words]).astype(np.int64), np.array(starts, np.int64)


def _numbered(one: Int64Array, other: Int64Array) -> Int64Array:
    """A number for each pair; two pairs have the same number only if they are equal."""
    return np.unique(one << 32 | other, return_inverse=True)[1].astype(np.int64)


def _once(documents: Int64Array, shingles: Int64Array) -> tuple[Int64Array, Int64Array]:
    both = np.unique(documents << 32 | shingles)
    return both >> 32, both & 0xFFFFFFFF


def _rarest_first(documents: Int64Array, shingles: Int64Array) -> sparse.csr_matrix:
    """Documents as rows, shingles as columns; the columns of each row are sorted, the rarest shingle first."""
    counts = np.bincount(shingles)
    column = np.empty(len(counts), np.int64)
    column[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    shape = (documents.max(initial=-1) + 1, len(counts))
    matrix = sparse.csr_matrix((np.ones(len(documents), np.int32), (documents, column[shingles])), shape)
    matrix.sort_indices()
    return matrix


def _candidates(
    matrix: sparse.csr_matrix, sizes: Int64Array, threshold: float
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Candidate pairs, which include all similar pairs; each pair once, the smaller number first.

    A set of n that has a Jaccard similarity of t with another has at least ⌈t·n⌉ elements in common with it. So in
    any order of all elements the two have one in common among the first n - ⌈t·n⌉ + 1 of each (Chaudhuri et al.
    2006; Bayardo et al. 2007), and neither is smaller than t times the other.
    """
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    place = np.arange(len(matrix.indices)) - np.repeat(matrix.indptr[:-1], sizes)
    first = place < np.repeat(prefix, sizes)
    rows, columns = np.repeat(np.arange(len(sizes)), sizes)[first], matrix.indices[first].astype(np.int64)
    order = np.lexsort((rows, sizes[rows], columns))  # of each shingle the shortest documents first
    rows, columns = rows[order], columns[order]
    longest = np.floor(sizes[rows] / threshold + 1e-9).astype(np.int64)
    ends = np.searchsorted(columns << 32 | sizes[rows], columns << 32 | longest, "right")
    pairs = _pairs_of_runs(rows, ends)
    for start in range(0, len(pairs), _CANDIDATES):
        part = pairs[start : start + _CANDIDATES]
        yield part >> 32, part & 0xFFFFFFFF


def _pairs_of_runs(rows: Int64Array, ends: Int64Array) -> Int64Array:
    """Each `rows[i]` with each of `rows[i + 1 : ends[i]]`: pairs as numbers, the smaller row in the upper half."""
    pairs, waiting = np.empty(0, np.int64), []
    left, step = np.arange(len(rows)), 1
    while len(left := left[left + step < ends[left]]):
        one, other = rows[left], rows[left + step]
        waiting.append(np.minimum(one, other) << 32 | np.maximum(one, other))
        step += 1
        if sum(map(len, waiting)) > _WAITING:
            pairs, waiting = np.unique(np.concatenate([pairs, *waiting])), []
    return np.unique(np.concatenate([pairs, *waiting]))


if __name__ == "__main__":
    run_command(main)

"""The exact Jaccard similarity of documents whose signatures leave it open whether they are alike.

FOLDED: Pairs of similar documents: the files that tasks write, and what estimates say of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array, UInt64Array
from deepseek_v3.data.deduplication.clusters import connected_components
from deepseek_v3.data.deduplication.key_files import read_shingle_counts, read_signatures
from deepseek_v3.data.deduplication.lsh import estimate_jaccard
from deepseek_v3.data.deduplication.minhash import MinHasher
from deepseek_v3.data.stages import NumberedPart, group_by_part

# The earlier and the later document, by number, and their Jaccard similarity, be it exact or estimated.
PAIR = np.dtype([("one", "<i8"), ("other", "<i8"), ("similarity", "<f8")])
Pairs = NDArray[np.void]

_DEVIATIONS = 3
_PAIRS_AT_ONCE = 2**16


def make_pairs(one: Int64Array, other: Int64Array, similarity: Float64Array) -> Pairs:
    """An array of `PAIR` from its columns."""
    pairs = np.empty(len(one), PAIR)
    pairs["one"], pairs["other"], pairs["similarity"] = one, other, similarity
    return pairs


def read_pairs(files: Iterable[Path]) -> Pairs:
    """All pairs in these files; a pair may be there more than once."""
    return np.concatenate([np.zeros(0, PAIR), *(np.load(file) for file in files)])


def unique_pairs(pairs: Pairs) -> Pairs:
    """Each pair once, ascending."""
    pairs = pairs[np.lexsort((pairs["other"], pairs["one"]))]
    new = np.ones(len(pairs), np.bool_)
    new[1:] = (pairs["one"][1:] != pairs["one"][:-1]) | (pairs["other"][1:] != pairs["other"][:-1])
    return pairs[new]


def estimate_margin(threshold: float, values: int) -> float:
    """How far an estimate from so many values may be off: three standard deviations at the threshold."""
    return _DEVIATIONS * math.sqrt(threshold * (1 - threshold) / values)


def estimate_pairs(parts: Sequence[NumberedPart], one: Int64Array, other: Int64Array) -> Float64Array:
    """Estimated Jaccard similarities of documents: float64 [pairs]."""
    found = np.empty(len(one))
    for start in range(0, len(one), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        signatures = read_signatures(parts, np.concatenate([one[some], other[some]]))
        first, second = np.split(np.arange(len(signatures)), 2)
        found[some] = estimate_jaccard(signatures, first, second)
    return found


def have_both_texts(parts: Sequence[NumberedPart], pairs: Pairs) -> BoolArray:
    """Of which pairs both texts are there to be compared: bool [pairs]."""
    there = np.ones(len(pairs), np.bool_)
    for side in ("one", "other"):
        for part, chosen in group_by_part(parts, pairs[side]):
            if part.records is None:
                there[chosen] = False
    return there


_HASH_BITS = np.uint64(32)
_BYTES_PER_SHINGLE = 50  # what `similarities` needs for each shingle of a document
_CHUNK_MEMORY = 2**25  # more would only leave fewer chunks to share


def split_pairs(parts: Sequence[NumberedPart], pairs: Pairs, memory: int) -> list[Pairs]:
    """Different pairs in chunks for `similarities` to take: those of a cluster together, so that few texts are read
    twice, and no more than need `memory` bytes.
    """
    clusters = connected_components(pairs["one"], pairs["other"], sum(part.rows for part in parts))[pairs["one"]]
    pairs = pairs[np.argsort(clusters, kind="stable")]
    documents, first = np.unique(np.stack([pairs["one"], pairs["other"]], axis=1), return_index=True)
    needed = np.zeros(2 * len(pairs), np.int64)
    needed[first] = read_shingle_counts(parts, documents).astype(np.int64) * _BYTES_PER_SHINGLE
    chunks = np.cumsum(needed)[1::2] // min(memory, _CHUNK_MEMORY)
    return [chunk for chunk in np.split(pairs, np.flatnonzero(np.diff(chunks)) + 1) if len(chunk)]


def jaccard_similarities(
    parts: Sequence[NumberedPart], one: Int64Array, other: Int64Array, hasher: MinHasher
) -> Float64Array:
    """The Jaccard similarities of the shingles of pairs of documents: float64 [pairs]."""
    documents, indices = np.unique(np.concatenate([one, other]), return_inverse=True)
    one, other = np.split(indices, 2)
    sets, offsets = _shingle_sets(parts, documents, hasher)
    sizes = np.diff(offsets)
    common = hasher.intersection_sizes(sets, offsets, one, other)
    return common / (sizes[one] + sizes[other] - common)


def _shingle_sets(
    parts: Sequence[NumberedPart], documents: Int64Array, hasher: MinHasher
) -> tuple[UInt64Array, Int64Array]:
    """The different shingles of each of these documents, ascending, as uint64, and where each document's begin."""
    sets: list[UInt64Array] = []
    for part, chosen in group_by_part(parts, documents):
        document = int(chosen[0])
        for texts in _texts(part, documents[chosen] - part.first):
            for shingles in hasher.shingles(texts):
                counts = np.diff(shingles.offsets)
                tags = np.arange(document, document + len(counts), dtype=np.uint64) << _HASH_BITS
                sets.append(_sorted_set(np.repeat(tags, counts) | shingles.hashes))
                document += len(counts)
    joined = np.concatenate(sets)  # ascending, for the runs are
    return joined, np.searchsorted(joined, np.arange(len(documents) + 1, dtype=np.uint64) << _HASH_BITS)


def _sorted_set(values: UInt64Array) -> UInt64Array:
    """The different values, ascending. Few at a time, so that they stay in the caches while they are sorted."""
    values.sort()
    new = np.ones(len(values), np.bool_)
    new[1:] = values[1:] != values[:-1]
    return values[new]


def _texts(part: NumberedPart, rows: Int64Array) -> Iterator[pa.Array]:
    """The texts of these rows, ascending, of a part's memory-mapped documents."""
    assert part.records is not None
    with pa.memory_map(str(part.records)) as file:
        first = 0
        for texts in pa.ipc.open_file(file).read_all().column("text").chunks:
            start, stop = np.searchsorted(rows, [first, first + len(texts)])
            yield texts.take(pa.array(rows[start:stop] - first))
            first += len(texts)

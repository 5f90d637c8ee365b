"""Pairs of similar documents, and the exact Jaccard similarity of those that signatures cannot decide.

If an estimate is within `estimate_margin` of the threshold, the shingles of both documents decide instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array, UInt64Array
from deepseek_v3.data.content import contents_of
from deepseek_v3.data.deduplication.clusters import connected_components
from deepseek_v3.data.deduplication.key_files import read_shingle_counts, read_signatures
from deepseek_v3.data.deduplication.lsh import estimate_jaccard
from deepseek_v3.data.deduplication.minhash import MinHasher
from deepseek_v3.data.stages import NumberedPart, group_by_part

# The numbers of the first and the second document, one < other, and their similarity, exact or estimated.
PAIR = np.dtype([("one", "<i8"), ("other", "<i8"), ("similarity", "<f8")])
Pairs = NDArray[np.void]

_DEVIATIONS = 3
_PAIRS_PER_CHUNK = 2**16
_HASH_BITS = np.uint64(32)
_BYTES_PER_SHINGLE = 50  # the memory that `exact_similarities` takes for each shingle of a document
_CHUNK_MEMORY = 2**25  # with larger chunks there would be too few to occupy all workers


def make_pairs(one: Int64Array, other: Int64Array, similarity: Float64Array) -> Pairs:
    """Returns an array of `PAIR` from its columns."""
    pairs = np.empty(len(one), PAIR)
    pairs["one"], pairs["other"], pairs["similarity"] = one, other, similarity
    return pairs


def read_pairs(files: Iterable[Path]) -> Pairs:
    """Reads all pairs in the files of tasks; a pair may occur more than once."""
    return np.concatenate([np.zeros(0, PAIR), *(np.load(file) for file in files)])


def unique_pairs(pairs: Pairs) -> Pairs:
    """Returns each pair once, in ascending order."""
    pairs = pairs[np.lexsort((pairs["other"], pairs["one"]))]
    new = np.ones(len(pairs), np.bool_)
    new[1:] = (pairs["one"][1:] != pairs["one"][:-1]) | (pairs["other"][1:] != pairs["other"][:-1])
    return pairs[new]


def estimate_margin(threshold: float, num_values: int) -> float:
    """Returns the margin of error of an estimate from `num_values` values: three standard deviations."""
    return _DEVIATIONS * math.sqrt(threshold * (1 - threshold) / num_values)


def estimate_pairs(parts: Sequence[NumberedPart], one: Int64Array, other: Int64Array) -> Float64Array:
    """Estimates the Jaccard similarities of pairs of documents from their signatures: float64 [pairs]."""
    found = np.empty(len(one))
    for start in range(0, len(one), _PAIRS_PER_CHUNK):
        chunk = slice(start, start + _PAIRS_PER_CHUNK)
        signatures = read_signatures(parts, np.concatenate([one[chunk], other[chunk]]))
        first, second = np.split(np.arange(len(signatures)), 2)
        found[chunk] = estimate_jaccard(signatures, first, second)
    return found


def have_both_texts(parts: Sequence[NumberedPart], pairs: Pairs) -> BoolArray:
    """Whether the texts of both documents of each pair are available: bool [pairs]."""
    available = np.ones(len(pairs), np.bool_)
    for side in ("one", "other"):
        for part, chosen in group_by_part(parts, pairs[side]):
            if part.records is None:
                available[chosen] = False
    return available


def split_pairs(parts: Sequence[NumberedPart], pairs: Pairs, memory: int) -> list[Pairs]:
    """Splits unique pairs into chunks for `exact_similarities`, each of which needs about `memory` bytes.

    A chunk needs no more than about 32 MiB, unless a single pair does. Pairs of one cluster follow each other, so
    that few texts are read for more than one chunk.
    """
    clusters = connected_components(pairs["one"], pairs["other"], sum(part.rows for part in parts))[pairs["one"]]
    pairs = pairs[np.argsort(clusters, kind="stable")]
    documents, first = np.unique(np.stack([pairs["one"], pairs["other"]], axis=1), return_index=True)
    needed = np.zeros(2 * len(pairs), np.int64)
    needed[first] = read_shingle_counts(parts, documents).astype(np.int64) * _BYTES_PER_SHINGLE
    chunks = np.cumsum(needed)[1::2] // min(memory, _CHUNK_MEMORY)
    return [chunk for chunk in np.split(pairs, np.flatnonzero(np.diff(chunks)) + 1) if len(chunk)]


def exact_similarities(
    parts: Sequence[NumberedPart], one: Int64Array, other: Int64Array, hasher: MinHasher
) -> Float64Array:
    """Computes the exact Jaccard similarities of the shingles of pairs of documents: float64 [pairs]."""
    documents, indices = np.unique(np.concatenate([one, other]), return_inverse=True)
    one, other = np.split(indices, 2)
    sets, offsets = _shingle_sets(parts, documents, hasher)
    sizes = np.diff(offsets)
    common = hasher.intersection_sizes(sets, offsets, one, other)
    return common / (sizes[one] + sizes[other] - common)


def _shingle_sets(
    parts: Sequence[NumberedPart], documents: Int64Array, hasher: MinHasher
) -> tuple[UInt64Array, Int64Array]:
    """Returns the shingle set of each document, ascending (uint64), and where each set starts."""
    sets: list[UInt64Array] = []
    for part, chosen in group_by_part(parts, documents):
        document = int(chosen[0])
        for records in _read_records(part, documents[chosen] - part.first):
            is_code = np.array([content == "code" for content in contents_of(records)], np.bool_)
            for shingles in hasher.shingles(records.column("text"), is_code):
                counts = np.diff(shingles.offsets)
                tags = np.arange(document, document + len(counts), dtype=np.uint64) << _HASH_BITS
                sets.append(_sorted_set(np.repeat(tags, counts) | shingles.hashes))
                document += len(counts)
    joined = np.concatenate(sets)  # ascending, because the document's number is the upper half of each member
    return joined, np.searchsorted(joined, np.arange(len(documents) + 1, dtype=np.uint64) << _HASH_BITS)


def _sorted_set(values: UInt64Array) -> UInt64Array:
    """Returns the distinct values, ascending; sorts in place. A block of values is small enough for the caches."""
    values.sort()
    new = np.ones(len(values), np.bool_)
    new[1:] = values[1:] != values[:-1]
    return values[new]


def _read_records(part: NumberedPart, rows: Int64Array) -> Iterator[pa.RecordBatch]:
    """Yields these rows, ascending, of a part's memory-mapped documents: texts, and what says what they hold."""
    assert part.records is not None
    with pa.memory_map(str(part.records)) as file:
        first = 0
        for batch in pa.ipc.open_file(file).read_all().select(["text", "source", "metadata"]).to_batches():
            start, stop = np.searchsorted(rows, [first, first + batch.num_rows])
            yield batch.take(pa.array(rows[start:stop] - first))
            first += batch.num_rows

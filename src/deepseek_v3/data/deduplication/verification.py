"""The exact Jaccard similarity of documents whose signatures leave it open whether they are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from deepseek_v3.data.deduplication.clusters import earliest_connected
from deepseek_v3.data.deduplication.keys import read_sizes
from deepseek_v3.data.deduplication.lsh import Floats
from deepseek_v3.data.deduplication.minhash import MinHasher
from deepseek_v3.data.deduplication.pairs import Pairs
from deepseek_v3.data.deduplication.utf8 import Int64s, UInt64s
from deepseek_v3.data.stages import Part, split_by_part

_HASH_BITS = np.uint64(32)
_BYTES_PER_SHINGLE = 50  # what `similarities` needs for each shingle of a document
_CHUNK_MEMORY = 2**25  # more would only leave fewer chunks to share


def in_chunks(parts: Sequence[Part], pairs: Pairs, memory: int) -> list[Pairs]:
    """Different pairs in chunks for `similarities` to take: those of a cluster together, so that few texts are read
    twice, and no more than need `memory` bytes.
    """
    clusters = earliest_connected(pairs["one"], pairs["other"], sum(part.rows for part in parts))[pairs["one"]]
    pairs = pairs[np.argsort(clusters, kind="stable")]
    documents, first = np.unique(np.stack([pairs["one"], pairs["other"]], axis=1), return_index=True)
    needed = np.zeros(2 * len(pairs), np.int64)
    needed[first] = read_sizes(parts, documents).astype(np.int64) * _BYTES_PER_SHINGLE
    chunks = np.cumsum(needed)[1::2] // min(memory, _CHUNK_MEMORY)
    return [chunk for chunk in np.split(pairs, np.flatnonzero(np.diff(chunks)) + 1) if len(chunk)]


def similarities(parts: Sequence[Part], one: Int64s, other: Int64s, hasher: MinHasher) -> Floats:
    """The Jaccard similarities of the shingles of pairs of documents: float64 [pairs]."""
    documents, indices = np.unique(np.concatenate([one, other]), return_inverse=True)
    one, other = np.split(indices, 2)
    sets, offsets = _shingle_sets(parts, documents, hasher)
    sizes = np.diff(offsets)
    common = hasher.common(sets, offsets, one, other)
    return common / (sizes[one] + sizes[other] - common)


def _shingle_sets(parts: Sequence[Part], documents: Int64s, hasher: MinHasher) -> tuple[UInt64s, Int64s]:
    """The different shingles of each of these documents, ascending, as uint64, and where each document's begin."""
    sets: list[UInt64s] = []
    for part, chosen in split_by_part(parts, documents):
        document = int(chosen[0])
        for texts in _texts(part, documents[chosen] - part.first):
            for shingles in hasher.shingles(texts):
                counts = np.diff(shingles.offsets)
                tags = np.arange(document, document + len(counts), dtype=np.uint64) << _HASH_BITS
                sets.append(_sorted_set(np.repeat(tags, counts) | shingles.hashes))
                document += len(counts)
    joined = np.concatenate(sets)  # ascending, for the runs are
    return joined, np.searchsorted(joined, np.arange(len(documents) + 1, dtype=np.uint64) << _HASH_BITS)


def _sorted_set(values: UInt64s) -> UInt64s:
    """The different values, ascending. Few at a time, so that they stay in the caches while they are sorted."""
    values.sort()
    new = np.ones(len(values), np.bool_)
    new[1:] = values[1:] != values[:-1]
    return values[new]


def _texts(part: Part, rows: Int64s) -> Iterator[pa.Array]:
    """The texts of these rows, ascending, of a part's memory-mapped documents."""
    assert part.records is not None
    with pa.memory_map(str(part.records)) as file:
        first = 0
        for texts in pa.ipc.open_file(file).read_all().column("text").chunks:
            start, stop = np.searchsorted(rows, [first, first + len(texts)])
            yield texts.take(pa.array(rows[start:stop] - first))
            first += len(texts)

"""The time-critical loops of deduplication in NumPy. `numba_kernels` gives the same results bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from deepseek_v3.data.arrays import (
    SPLITMIX64_GAMMA,
    SPLITMIX64_MIX_1,
    SPLITMIX64_MIX_2,
    Int64Array,
    UInt8Array,
    UInt32Array,
    UInt64Array,
)
from deepseek_v3.data.deduplication.case_folding import MAX_WORD_BYTES, FoldedText
from deepseek_v3.data.deduplication.hashing import MIX_32
from deepseek_v3.data.deduplication.utf8 import WINDOW_BYTES, byte_windows

_LOW_BYTES = np.array([2 ** (8 * size) - 1 for size in range(WINDOW_BYTES + 1)], np.uint64)
_FULL_WINDOW = np.uint64(2**56)  # the smallest window whose last byte is not 0
_PRODUCTS_PER_CHUNK = 2**17  # products of shingle hashes and multipliers: half a megabyte
_SHINGLES_PER_CHUNK = 2**18
_HASH_BITS = np.uint64(32)
_HASH_MASK = np.uint64(2**32 - 1)


def shingle_hashes(
    folded: FoldedText, offsets: Int64Array, multipliers: UInt32Array
) -> tuple[UInt32Array, Int64Array]:
    """Hashes all shingles of a block of documents.

    `offsets`: int64 [documents + 1]. `multipliers`: uint32 [ngram]. Returns the hashes (uint32 [shingles], never 0)
    and the start of each document's (int64 [documents + 1]).
    """
    starts = _find_word_starts(folded)
    firsts = np.searchsorted(starts, offsets)
    return _hash_shingles(
        _hash_words(byte_windows(folded.text), np.append(starts, offsets[-1])), firsts, multipliers
    )


def minhash_signatures(hashes: UInt32Array, offsets: Int64Array, multipliers: UInt32Array) -> UInt32Array:
    """Computes MinHash signatures: the minimum of hash * multiplier mod 2^32, per document and multiplier.

    `hashes`: uint32 [shingles]. `offsets`: int64 [documents + 1]. `multipliers`: uint32 [values]. Returns uint32
    [documents, values]; all 2^32 - 1 for a document without shingles.
    """
    filled = np.flatnonzero(np.diff(offsets))
    least = np.full((len(multipliers), len(offsets) - 1), 2**32 - 1, np.uint32)
    if len(filled):
        products = np.empty((max(_PRODUCTS_PER_CHUNK // len(hashes), 1), len(hashes)), np.uint32)
        for first in range(0, len(multipliers), len(products)):
            chunk = multipliers[first : first + len(products), None]
            np.multiply(chunk, hashes, out=products[: len(chunk)])
            found = np.minimum.reduceat(products[: len(chunk)], offsets[filled], axis=1)
            least[first : first + len(chunk), filled] = found
    return np.ascontiguousarray(least.T)


def intersection_sizes(sets: UInt64Array, offsets: Int64Array, one: Int64Array, other: Int64Array) -> Int64Array:
    """Returns the sizes of the intersections of pairs of sets: int64 [pairs].

    Set s is `sets[offsets[s] : offsets[s + 1]]` (uint64, `offsets` int64 [sets + 1]), ascending and without
    repeats; only the lower 32 bits of each member count. `one` and `other` (int64 [pairs]) number sets.
    """
    sizes = np.diff(offsets)
    counts = np.zeros(len(one), np.int64)
    for chunk in _chunks(sizes[one] + sizes[other]):
        # Sort the members of both sets of a pair, tagged with the pair: common members then occur twice in a row.
        tagged = np.concatenate([_tag_members(sets, offsets, side[chunk]) for side in (one, other)])
        tagged.sort()
        twice = tagged[1:][tagged[1:] == tagged[:-1]] >> _HASH_BITS
        counts[chunk] = np.bincount(twice.astype(np.int64), minlength=len(one[chunk]))
    return counts


def remove_bytes(text: UInt8Array, offsets: Int64Array, unwanted: bytes) -> tuple[UInt8Array, Int64Array]:
    """Removes the `unwanted` bytes from a block of documents.

    `text`: uint8 [n]. `offsets`: int64 [documents + 1]. Returns the remaining text and its offsets.
    """
    documents = [text[a:b].tobytes().translate(None, unwanted) for a, b in pairwise(offsets.tolist())]
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return np.frombuffer(b"".join(documents), np.uint8), np.append(np.int64(0), ends)


def _tag_members(sets: UInt64Array, offsets: Int64Array, chosen: Int64Array) -> UInt64Array:
    """Returns the members of the chosen sets, with the index of the set in `chosen` in the upper half of each."""
    sizes = offsets[chosen + 1] - offsets[chosen]
    ends = np.cumsum(sizes)
    positions = np.arange(ends[-1]) + np.repeat(offsets[chosen] - (ends - sizes), sizes)
    tags = np.arange(len(chosen), dtype=np.uint64) << _HASH_BITS
    return sets[positions] & _HASH_MASK | np.repeat(tags, sizes)


def _chunks(sizes: Int64Array) -> Iterator[slice]:
    """Yields chunks of pairs with at most `_SHINGLES_PER_CHUNK` shingles in all, or a single larger pair."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        limit = (ends[start - 1] if start else 0) + _SHINGLES_PER_CHUNK
        stop = max(int(np.searchsorted(ends, limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _find_word_starts(folded: FoldedText) -> Int64Array:
    """Returns where words start. A run of more than `MAX_WORD_BYTES` bytes is cut into several words."""
    inside = folded.text[: len(folded.word_breaks)] != 0
    begins = inside & folded.word_breaks
    begins[1:] |= inside[1:] & ~inside[:-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff(starts, append=len(inside) - 1)
    long = np.flatnonzero(sizes > MAX_WORD_BYTES)
    long = long[inside[starts[long] + MAX_WORD_BYTES]]
    if not len(long):
        return starts
    further = (sizes[long] - 1) // MAX_WORD_BYTES
    numbers = np.arange(1, further.sum() + 1) - np.repeat(np.cumsum(further) - further, further)
    cuts = np.repeat(starts[long], further) + numbers * MAX_WORD_BYTES
    return np.sort(np.concatenate([starts, cuts[inside[cuts]]]))


def _hash_words(windows: UInt64Array, starts: Int64Array) -> UInt32Array:
    """Hashes words to uint32 [words], given their starts and the end of the block. Bytes between words are 0."""
    starts, sizes = starts[:-1], np.diff(starts)
    found = windows[starts] & _LOW_BYTES[np.minimum(sizes, WINDOW_BYTES)]
    totals = _hash_windows(found)
    longer = np.flatnonzero(found >= _FULL_WINDOW)
    for number in range(1, MAX_WORD_BYTES // WINDOW_BYTES):
        if not len(longer):
            break
        found = windows[starts[longer] + number * WINDOW_BYTES]
        found &= _LOW_BYTES[np.minimum(sizes[longer] - number * WINDOW_BYTES, WINDOW_BYTES)]
        totals[longer] += _hash_windows(found + np.uint64(number * SPLITMIX64_GAMMA % 2**64)) * (found != 0)
        longer = longer[found >= _FULL_WINDOW]
    return (totals >> np.uint64(32)).astype(np.uint32)


def _hash_windows(windows: UInt64Array) -> UInt64Array:
    hashes = windows * np.uint64(SPLITMIX64_MIX_1)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(SPLITMIX64_MIX_2)
    return hashes


def _hash_shingles(
    words: UInt32Array, offsets: Int64Array, multipliers: UInt32Array
) -> tuple[UInt32Array, Int64Array]:
    """Combines the hashes of the documents' words into those of their shingles, and returns their offsets."""
    ngram = len(multipliers)
    padded = np.append(words, np.zeros(ngram - 1, np.uint32))
    totals = words * multipliers[0]
    for position in range(1, ngram):
        totals += padded[position : position + len(words)] * multipliers[position]
    starts, ends = offsets[:-1], offsets[1:]
    counts = ends - starts
    for document in np.flatnonzero((counts > 0) & (counts < ngram)).tolist():
        few = words[starts[document] : ends[document]]
        totals[starts[document]] = (few * multipliers[: len(few)]).sum(dtype=np.uint32)

    whole = np.ones(len(words), np.bool_)
    for back in range(1, ngram):
        last = ends - back
        whole[last[last > starts]] = False
    hashes = totals[whole]
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(MIX_32)
    hashes ^= hashes >> np.uint32(15)
    sizes = np.where(counts > 0, np.maximum(counts - ngram + 1, 1), 0)
    return np.maximum(hashes, np.uint32(1)), np.append(0, np.cumsum(sizes))

"""The loops over all text that cost the time, in NumPy. `numba_kernels` computes the same bit for bit."""

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
_EIGHT_BYTES = np.uint64(2**56)  # the least piece whose last byte is not 0
_AT_ONCE = 2**17  # products of shingles and multipliers: half a megabyte
_SHINGLES_AT_ONCE = 2**18
_HASH_BITS = np.uint64(32)
_HASH_MASK = np.uint64(2**32 - 1)


def shingle_hashes(
    folded: FoldedText, offsets: Int64Array, multipliers: UInt32Array
) -> tuple[UInt32Array, Int64Array]:
    """The hashes of all shingles of a block's documents.

    `offsets`: int64 [documents + 1]. `multipliers`: uint32 [ngram]. Returns uint32 [shingles], never 0, and where
    each document's begin: int64 [documents + 1].
    """
    starts = _find_word_starts(folded)
    firsts = np.searchsorted(starts, offsets)
    return _hash_shingles(
        _hash_words(byte_windows(folded.text), np.append(starts, offsets[-1])), firsts, multipliers
    )


def minhash_signatures(hashes: UInt32Array, offsets: Int64Array, multipliers: UInt32Array) -> UInt32Array:
    """The least product, mod 2^32, of any of a document's hashes with each multiplier.

    `hashes`: uint32 [shingles]. `offsets`: int64 [documents + 1]. Returns uint32 [documents, multipliers], with the
    greatest number there is for a document without shingles.
    """
    filled = np.flatnonzero(np.diff(offsets))
    least = np.full((len(multipliers), len(offsets) - 1), 2**32 - 1, np.uint32)
    if len(filled):
        products = np.empty((max(_AT_ONCE // len(hashes), 1), len(hashes)), np.uint32)
        for first in range(0, len(multipliers), len(products)):
            some = multipliers[first : first + len(products), None]
            np.multiply(some, hashes, out=products[: len(some)])
            found = np.minimum.reduceat(products[: len(some)], offsets[filled], axis=1)
            least[first : first + len(some), filled] = found
    return np.ascontiguousarray(least.T)


def intersection_sizes(sets: UInt64Array, offsets: Int64Array, one: Int64Array, other: Int64Array) -> Int64Array:
    """How many members two sets have in common, for pairs of sets: int64 [pairs].

    Set s stands, ascending and without repeats, from `offsets[s]` to `offsets[s + 1]` (int64 [sets + 1]) in `sets`;
    the lower 32 bits of each number count.
    """
    sizes = np.diff(offsets)
    counts = np.zeros(len(one), np.int64)
    for some in _runs(sizes[one] + sizes[other]):
        # The members of both sets of a pair, tagged with the pair, are sorted; those in common stand there twice.
        tagged = np.concatenate([_tagged(sets, offsets, one[some]), _tagged(sets, offsets, other[some])])
        tagged.sort()
        twice = tagged[1:][tagged[1:] == tagged[:-1]] >> _HASH_BITS
        counts[some] = np.bincount(twice.astype(np.int64), minlength=len(one[some]))
    return counts


def remove_bytes(text: UInt8Array, offsets: Int64Array, left_out: bytes) -> tuple[UInt8Array, Int64Array]:
    """The documents of a block without certain bytes.

    `offsets`: int64 [documents + 1], where each begins in `text` (uint8). Returns the same of what is left.
    """
    documents = [text[a:b].tobytes().translate(None, left_out) for a, b in pairwise(offsets.tolist())]
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return np.frombuffer(b"".join(documents), np.uint8), np.append(np.int64(0), ends)


def _tagged(sets: UInt64Array, offsets: Int64Array, chosen: Int64Array) -> UInt64Array:
    """The members of these sets, each with the index of its set among them in the upper half."""
    sizes = offsets[chosen + 1] - offsets[chosen]
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1]) + np.repeat(offsets[chosen] - (ends - sizes), sizes)
    tags = np.arange(len(chosen), dtype=np.uint64) << _HASH_BITS
    return sets[places] & _HASH_MASK | np.repeat(tags, sizes)


def _runs(sizes: Int64Array) -> Iterator[slice]:
    """Runs of pairs that take about `_SHINGLES_AT_ONCE` shingles, or one pair that takes more."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        limit = (ends[start - 1] if start else 0) + _SHINGLES_AT_ONCE
        stop = max(int(np.searchsorted(ends, limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _find_word_starts(folded: FoldedText) -> Int64Array:
    """Where words begin, those included into which a run of more than `LONGEST` bytes is cut."""
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
    places = np.repeat(starts[long], further) + numbers * MAX_WORD_BYTES
    return np.sort(np.concatenate([starts, places[inside[places]]]))


def _hash_words(pieces: UInt64Array, starts: Int64Array) -> UInt32Array:
    """uint32 [words], from where each word begins, and the block's end. All bytes between words are 0."""
    starts, sizes = starts[:-1], np.diff(starts)
    found = pieces[starts] & _LOW_BYTES[np.minimum(sizes, WINDOW_BYTES)]
    totals = _hash_windows(found)
    longer = np.flatnonzero(found >= _EIGHT_BYTES)
    for number in range(1, MAX_WORD_BYTES // WINDOW_BYTES):
        if not len(longer):
            break
        found = pieces[starts[longer] + number * WINDOW_BYTES]
        found &= _LOW_BYTES[np.minimum(sizes[longer] - number * WINDOW_BYTES, WINDOW_BYTES)]
        totals[longer] += _hash_windows(found + np.uint64(number * SPLITMIX64_GAMMA % 2**64)) * (found != 0)
        longer = longer[found >= _EIGHT_BYTES]
    return (totals >> np.uint64(32)).astype(np.uint32)


def _hash_windows(pieces: UInt64Array) -> UInt64Array:
    pieces = pieces * np.uint64(SPLITMIX64_MIX_1)
    pieces ^= pieces >> np.uint64(32)
    pieces *= np.uint64(SPLITMIX64_MIX_2)
    return pieces


def _hash_shingles(
    words: UInt32Array, offsets: Int64Array, multipliers: UInt32Array
) -> tuple[UInt32Array, Int64Array]:
    """The hashes of shingles, from those of the documents' words."""
    ngram = len(multipliers)
    padded = np.append(words, np.zeros(ngram - 1, np.uint32))
    totals = words * multipliers[0]
    for place in range(1, ngram):
        totals += padded[place : place + len(words)] * multipliers[place]
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

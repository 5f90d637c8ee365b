"""`numpy_kernels` as loops that Numba compiles: the same functions, the same results bit for bit.

Compiled code is kept beside this file or in the user's cache, so that only the first process on a machine compiles.
Coverage cannot see it run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from deepseek_v3.data import arrays
from deepseek_v3.data.arrays import Int64Array, UInt8Array, UInt32Array, UInt64Array
from deepseek_v3.data.deduplication import case_folding, hashing, utf8
from deepseek_v3.data.deduplication.case_folding import FoldedText

_WINDOW_BYTES = utf8.WINDOW_BYTES
_MAX_WORD_BYTES = case_folding.MAX_WORD_BYTES
_MIX_1 = np.uint64(arrays.SPLITMIX64_MIX_1)
_MIX_2 = np.uint64(arrays.SPLITMIX64_MIX_2)
_STEP = np.uint64(arrays.SPLITMIX64_GAMMA)
_MIX_32 = np.uint32(hashing.MIX_32)
_LOW_BYTES = np.array([2 ** (8 * size) - 1 for size in range(_WINDOW_BYTES + 1)], np.uint64)
_GREATEST = np.uint32(2**32 - 1)
_HASH_MASK = np.uint64(2**32 - 1)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function at once, or loads what was compiled before; without a cache where none is writable."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, cache=True)(function)
        except RuntimeError:
            return numba.njit(signature)(function)

    return compile_function


def shingle_hashes(
    folded: FoldedText, offsets: Int64Array, multipliers: UInt32Array
) -> tuple[UInt32Array, Int64Array]:
    """As `numpy_kernels.shingle_hashes`."""
    return _shingle_hashes(folded.text, folded.word_breaks, offsets, multipliers)


def minhash_signatures(hashes: UInt32Array, offsets: Int64Array, multipliers: UInt32Array) -> UInt32Array:
    """As `numpy_kernels.minhash_signatures`."""
    return _minhash_signatures(hashes, offsets, multipliers)


def intersection_sizes(sets: UInt64Array, offsets: Int64Array, one: Int64Array, other: Int64Array) -> Int64Array:
    """As `numpy_kernels.intersection_sizes`."""
    return _intersection_sizes(sets, offsets, one, other)


def remove_bytes(text: UInt8Array, offsets: Int64Array, left_out: bytes) -> tuple[UInt8Array, Int64Array]:
    """As `numpy_kernels.remove_bytes`."""
    kept = np.ones(256, np.uint8)
    kept[[*left_out]] = 0
    return _remove_bytes(text, offsets, kept)


@numba.njit(inline="always")
def _read_window(text, start, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The bytes from `start` on as a number, the first one lowest: 8 of them, or `size` where that is less.

    Unsigned indices spare the test for negative ones; what is left compiles to one load.
    """
    piece = np.uint64(0)
    for byte in range(_WINDOW_BYTES):
        piece |= np.uint64(text[np.uint64(start) + np.uint64(byte)]) << np.uint64(8 * byte)
    return piece & _LOW_BYTES[min(size, _WINDOW_BYTES)]


@numba.njit(inline="always")
def _hash_window(piece):  # type: ignore[no-untyped-def]  # pragma: no cover
    piece = piece * _MIX_1
    return (piece ^ (piece >> np.uint64(32))) * _MIX_2


@numba.njit(inline="always")
def _hash_word(text, start, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    piece = _read_window(text, start, size)
    total = _hash_window(piece)
    place = _WINDOW_BYTES
    while piece >> np.uint64(56) and place < size:
        piece = _read_window(text, start + place, size - place)
        if piece:
            total += _hash_window(piece + np.uint64(place // _WINDOW_BYTES) * _STEP)
        place += _WINDOW_BYTES
    return np.uint32(total >> np.uint64(32))


@numba.njit
def _find_word_starts(text, cuts, begins, starts):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes where words begin, and the end behind; returns how many begin. `begins` is room for as many bytes."""
    begins[0] = text[0] != 0
    for place in range(1, len(text)):
        begins[place] = (text[place] != 0) & (cuts[place] | (text[place - 1] == 0))
    count = 0
    for place in range(len(text)):
        starts[count] = place
        count += begins[place]
    starts[count] = len(text)
    return count


@numba.njit
def _hash_words(text, starts, runs, words):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes the hashes of the words in as many runs of letters; returns how many words they are."""
    count = 0
    for run in range(runs):
        start, end = starts[run], starts[run + 1]
        going_on = True
        while going_on:
            words[count] = _hash_word(text, start, min(end - start, _MAX_WORD_BYTES))
            count += 1
            start += _MAX_WORD_BYTES
            going_on = start < end and text[start] != 0
    return count


@numba.njit
def _hash_shingles(words, count, multipliers, hashes):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes the hashes of the shingles of so many words; returns how many they are."""
    if not count:
        return 0
    ngram = min(len(multipliers), count)
    shingles = count - ngram + 1
    hashes[:shingles] = 0
    for place in range(ngram):
        for index in range(shingles):
            hashes[index] += words[index + place] * multipliers[place]
    for index in range(shingles):
        mixed = hashes[index]
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * _MIX_32)
        hashes[index] = max(mixed ^ (mixed >> np.uint32(15)), np.uint32(1))
    return shingles


@_compiled("Tuple((uint32[::1], int64[::1]))(uint8[::1], boolean[::1], int64[::1], uint32[::1])")
def _shingle_hashes(text, cuts, offsets, multipliers):  # type: ignore[no-untyped-def]  # pragma: no cover
    documents = len(offsets) - 1
    longest = 1
    for document in range(documents):
        longest = max(longest, offsets[document + 1] - offsets[document])
    begins = np.empty(longest, np.bool_)
    starts = np.empty(longest + 1, np.int64)
    words = np.empty(longest, np.uint32)
    hashes = np.empty(len(cuts), np.uint32)
    firsts = np.zeros(documents + 1, np.int64)
    for document in range(documents):
        first, end = offsets[document], offsets[document + 1]
        count = 0
        if end > first:
            runs = _find_word_starts(text[first:end], cuts[first:end], begins, starts)
            count = _hash_words(text[first:], starts, runs, words)
        at = firsts[document]
        firsts[document + 1] = at + _hash_shingles(words, count, multipliers, hashes[at:])
    return hashes[: firsts[documents]].copy(), firsts


@_compiled("uint32[:, ::1](uint32[::1], int64[::1], uint32[::1])")
def _minhash_signatures(hashes, offsets, multipliers):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Eight shingles at a time, so that a minimum is loaded and stored only once for all of them."""
    least = np.full((len(offsets) - 1, len(multipliers)), _GREATEST)
    for document in range(len(offsets) - 1):
        row = least[document]
        last = offsets[document + 1] - 1
        for i in range(offsets[document], last + 1, 8):
            a, b, c, d = hashes[i], hashes[min(i + 1, last)], hashes[min(i + 2, last)], hashes[min(i + 3, last)]
            e, f = hashes[min(i + 4, last)], hashes[min(i + 5, last)]
            g, h = hashes[min(i + 6, last)], hashes[min(i + 7, last)]
            for j in range(len(multipliers)):
                m = multipliers[j]
                low = min(min(np.uint32(m * a), np.uint32(m * b)), min(np.uint32(m * c), np.uint32(m * d)))
                high = min(min(np.uint32(m * e), np.uint32(m * f)), min(np.uint32(m * g), np.uint32(m * h)))
                row[j] = min(row[j], min(low, high))
    return least


@_compiled("int64[::1](uint64[::1], int64[::1], int64[::1], int64[::1])")
def _intersection_sizes(sets, offsets, one, other):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Goes through both sets of a pair side by side; no branch depends on what is in them."""
    counts = np.zeros(len(one), np.int64)
    for pair in range(len(one)):
        i, i_end = offsets[one[pair]], offsets[one[pair] + 1]
        j, j_end = offsets[other[pair]], offsets[other[pair] + 1]
        count = 0
        while i < i_end and j < j_end:
            a, b = sets[i] & _HASH_MASK, sets[j] & _HASH_MASK
            count += a == b
            i += a <= b
            j += b <= a
        counts[pair] = count
    return counts


@_compiled("Tuple((uint8[::1], int64[::1]))(uint8[::1], int64[::1], uint8[::1])")
def _remove_bytes(text, offsets, kept):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes every byte, and goes on behind those that are kept."""
    left = np.empty(len(text) + 1, np.uint8)
    places = np.zeros(len(offsets), np.int64)
    end = 0
    for document in range(len(offsets) - 1):
        for place in range(offsets[document], offsets[document + 1]):
            left[end] = text[place]
            end += kept[text[place]]
        places[document + 1] = end
    return left[:end], places

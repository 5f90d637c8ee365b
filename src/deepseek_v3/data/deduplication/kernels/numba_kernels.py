"""The functions of `numpy_kernels` as loops that Numba compiles, with the same results bit for bit.

Numba caches the compiled code beside this file or in the user's cache directory, so that only the first process on
a machine compiles. Coverage cannot measure compiled code.
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
_GAMMA = np.uint64(arrays.SPLITMIX64_GAMMA)
_MIX_1 = np.uint64(arrays.SPLITMIX64_MIX_1)
_MIX_2 = np.uint64(arrays.SPLITMIX64_MIX_2)
_MIX_32 = np.uint32(hashing.MIX_32)
_LOW_BYTES = np.array([2 ** (8 * size) - 1 for size in range(_WINDOW_BYTES + 1)], np.uint64)
_MAX_UINT32 = np.uint32(2**32 - 1)
_HASH_MASK = np.uint64(2**32 - 1)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function at import, or loads it from the cache; compiles without a cache if none is writable."""

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


def remove_bytes(text: UInt8Array, offsets: Int64Array, unwanted: bytes) -> tuple[UInt8Array, Int64Array]:
    """As `numpy_kernels.remove_bytes`."""
    kept = np.ones(256, np.uint8)
    kept[[*unwanted]] = 0
    return _remove_bytes(text, offsets, kept)


@numba.njit(inline="always")
def _read_window(text, start, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Reads min(size, 8) bytes from `start` on as a little-endian number.

    With unsigned indices Numba omits the test for negative ones, and the loop compiles to a single load.
    """
    window = np.uint64(0)
    for byte in range(_WINDOW_BYTES):
        window |= np.uint64(text[np.uint64(start) + np.uint64(byte)]) << np.uint64(8 * byte)
    return window & _LOW_BYTES[min(size, _WINDOW_BYTES)]


@numba.njit(inline="always")
def _hash_window(window):  # type: ignore[no-untyped-def]  # pragma: no cover
    mixed = window * _MIX_1
    return (mixed ^ (mixed >> np.uint64(32))) * _MIX_2


@numba.njit(inline="always")
def _hash_word(text, start, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    window = _read_window(text, start, size)
    total = _hash_window(window)
    position = _WINDOW_BYTES
    while window >> np.uint64(56) and position < size:
        window = _read_window(text, start + position, size - position)
        if window:
            total += _hash_window(window + np.uint64(position // _WINDOW_BYTES) * _GAMMA)
        position += _WINDOW_BYTES
    return np.uint32(total >> np.uint64(32))


@numba.njit
def _find_word_starts(text, word_breaks, is_start, starts):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes the starts of runs of word characters, then the end of the text; returns the number of runs.

    `is_start` (bool) is scratch space of at least the text's length.
    """
    is_start[0] = text[0] != 0
    for position in range(1, len(text)):
        is_start[position] = (text[position] != 0) & (word_breaks[position] | (text[position - 1] == 0))
    count = 0
    for position in range(len(text)):
        starts[count] = position
        count += is_start[position]
    starts[count] = len(text)
    return count


@numba.njit
def _hash_words(text, starts, runs, words):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes the hashes of the words in `runs` runs of word characters; returns the number of words."""
    count = 0
    for run in range(runs):
        start, end = starts[run], starts[run + 1]
        in_run = True
        while in_run:
            words[count] = _hash_word(text, start, min(end - start, _MAX_WORD_BYTES))
            count += 1
            start += _MAX_WORD_BYTES
            in_run = start < end and text[start] != 0
    return count


@numba.njit
def _hash_shingles(words, count, multipliers, hashes):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Writes the hashes of the shingles of `count` words; returns the number of shingles."""
    if not count:
        return 0
    ngram = min(len(multipliers), count)
    shingles = count - ngram + 1
    hashes[:shingles] = 0
    for position in range(ngram):
        for index in range(shingles):
            hashes[index] += words[index + position] * multipliers[position]
    for index in range(shingles):
        mixed = hashes[index]
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * _MIX_32)
        hashes[index] = max(mixed ^ (mixed >> np.uint32(15)), np.uint32(1))
    return shingles


@_compiled("Tuple((uint32[::1], int64[::1]))(uint8[::1], boolean[::1], int64[::1], uint32[::1])")
def _shingle_hashes(text, word_breaks, offsets, multipliers):  # type: ignore[no-untyped-def]  # pragma: no cover
    documents = len(offsets) - 1
    longest = 1
    for document in range(documents):
        longest = max(longest, offsets[document + 1] - offsets[document])
    is_start = np.empty(longest, np.bool_)
    starts = np.empty(longest + 1, np.int64)
    words = np.empty(longest, np.uint32)
    hashes = np.empty(len(word_breaks), np.uint32)
    firsts = np.zeros(documents + 1, np.int64)
    for document in range(documents):
        first, end = offsets[document], offsets[document + 1]
        count = 0
        if end > first:
            runs = _find_word_starts(text[first:end], word_breaks[first:end], is_start, starts)
            count = _hash_words(text[first:], starts, runs, words)
        at = firsts[document]
        firsts[document + 1] = at + _hash_shingles(words, count, multipliers, hashes[at:])
    return hashes[: firsts[documents]].copy(), firsts


@_compiled("uint32[:, ::1](uint32[::1], int64[::1], uint32[::1])")
def _minhash_signatures(hashes, offsets, multipliers):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Processes eight shingles at a time, so that each minimum is loaded and stored once for all eight."""
    least = np.full((len(offsets) - 1, len(multipliers)), _MAX_UINT32)
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
    """Merges both sets of each pair in step; no branch depends on their members."""
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
    """Writes every byte, and advances the end only past kept ones, so that no branch depends on the text."""
    left = np.empty(len(text) + 1, np.uint8)
    left_offsets = np.zeros(len(offsets), np.int64)
    end = 0
    for document in range(len(offsets) - 1):
        for position in range(offsets[document], offsets[document + 1]):
            left[end] = text[position]
            end += kept[text[position]]
        left_offsets[document + 1] = end
    return left[:end], left_offsets

"""Operations on ragged arrays: numbering of equal strings, first occurrences, sums over segments.

Segment i of an array is items[starts[i] : starts[i + 1]].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.arrays import BoolArray, Int64Array


def encode_strings(strings: pa.Array) -> tuple[Int64Array, pa.Array]:
    """Numbers the distinct strings: returns the number of each string, and the string of each number."""
    encoded = pc.dictionary_encode(strings)
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def string_lengths(strings: pa.Array) -> Int64Array:
    """Returns the number of characters of each string."""
    return pc.utf8_length(strings).to_numpy().astype(np.int64)


def to_mask(booleans: pa.Array) -> BoolArray:
    """Converts Arrow booleans to NumPy."""
    return booleans.to_numpy(zero_copy_only=False)


def matches_any(test: Callable[..., pa.Array], strings: pa.Array, patterns: Sequence[str]) -> BoolArray:
    """Marks the strings that pass a test of Arrow, such as `starts_with`, with any of the patterns."""
    return np.logical_or.reduce([to_mask(test(strings, pattern)) for pattern in patterns])


def flatten_lists(lists: pa.ListArray) -> tuple[pa.Array, Int64Array]:
    """Returns the items of all lists, and the starts of their segments, one per list."""
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten(), starts - starts[0]


def prefix_sums(values: Int64Array | BoolArray) -> Int64Array:
    """Returns the sum of all values before each one, followed by the sum of all: int64 [values + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def segment_sums(values: Int64Array | BoolArray, starts: Int64Array) -> Int64Array:
    """Returns the sum of each segment."""
    return np.diff(prefix_sums(values)[starts])


def segment_ids(starts: Int64Array) -> Int64Array:
    """Returns the segment of each item."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def first_occurrences(keys: Int64Array) -> Int64Array:
    """Returns, for each key (not negative), the index of the first equal key."""
    count = len(keys)
    bits = max(count - 1, 0).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits < 64:  # sorting key and index as one number is 10 times faster
        packed = np.sort(keys << bits | np.arange(count))
        order, ordered = packed & ((1 << bits) - 1), packed >> bits
    else:
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    first = np.empty(count, np.int64)
    first[order] = np.repeat(order[begins], np.diff(begins, append=count))
    return first


def seen_before(numbers: Int64Array, starts: Int64Array) -> BoolArray:
    """Marks the items (not negative) that also occur earlier in their segment."""
    keys = segment_ids(starts) * (int(numbers.max(initial=0)) + 1) + numbers
    return first_occurrences(keys) != np.arange(len(keys))

"""Equal items, and sums over runs of items. A run i is the items starts[i] to starts[i + 1] - 1, perhaps none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.arrays import BoolArray, Int64Array


def encode_strings(strings: pa.Array) -> tuple[Int64Array, pa.Array]:
    """A number for each string, the same for equal ones, and the string of each number."""
    encoded = pc.dictionary_encode(strings)
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def string_lengths(strings: pa.Array) -> Int64Array:
    """Characters of each string."""
    return pc.utf8_length(strings).to_numpy().astype(np.int64)


def to_mask(truths: pa.Array) -> BoolArray:
    """Arrow's truth values in NumPy."""
    return truths.to_numpy(zero_copy_only=False)


def matches_any(test: Callable[..., pa.Array], strings: pa.Array, patterns: Sequence[str]) -> BoolArray:
    """Which strings pass one of Arrow's tests with any of the patterns."""
    return np.logical_or.reduce([to_mask(test(strings, pattern)) for pattern in patterns])


def flatten_lists(lists: pa.ListArray) -> tuple[pa.Array, Int64Array]:
    """The items of all lists, and the runs that are the lists."""
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten(), starts - starts[0]


def prefix_sums(values: Int64Array | BoolArray) -> Int64Array:
    """The sum of all values before each one, and of all of them: one number more than there are values."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def segment_sums(values: Int64Array | BoolArray, starts: Int64Array) -> Int64Array:
    """The sum over each run."""
    return np.diff(prefix_sums(values)[starts])


def segment_ids(starts: Int64Array) -> Int64Array:
    """For each item of all runs, the number of its run."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def first_occurrences(keys: Int64Array) -> Int64Array:
    """For each key (not negative) the index of the first equal one."""
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
    """Whether each item stood before in its run."""
    keys = segment_ids(starts) * (int(numbers.max(initial=0)) + 1) + numbers
    return first_occurrences(keys) != np.arange(len(keys))

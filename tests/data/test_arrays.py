"""The operations on 64-bit integers agree with their definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.arrays import SPLITMIX64_GAMMA, find_sorted, mix64


def test_mix64_gives_the_published_sequence_of_splitmix64() -> None:
    seed = 1234567
    states = np.array([(seed + number * SPLITMIX64_GAMMA) % 2**64 for number in range(1, 4)], np.uint64)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, 20)), st.lists(st.integers(0, 20)))
def test_find_sorted_equals_a_plain_search(keys: list[int], wanted: list[int]) -> None:
    found = find_sorted(np.unique(np.array(keys, np.int64)), np.array(wanted, np.int64)).tolist()
    ascending = sorted({*keys})
    assert found == [ascending.index(number) if number in ascending else -1 for number in wanted]


def test_find_sorted_returns_the_last_of_equal_keys() -> None:
    assert find_sorted(np.array([1, 4, 4, 4, 9]), np.array([4, 9, 5])).tolist() == [3, 4, -1]

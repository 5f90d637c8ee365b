"""The order of a mixture, compared with a count of every sample."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.tokens.mixture_order import MixtureOrder

WEIGHTS = st.lists(st.fractions(Fraction(1, 10**6), 10**3, max_denominator=10**6), min_size=1, max_size=9)
FAR = st.integers(0, 10**15)


def shares_of(weights: list[Fraction]) -> list[Fraction]:
    return [weight / sum(weights) for weight in weights]


@given(WEIGHTS, st.integers(1, 100))
def test_every_count_is_right_at_every_moment(weights, length):
    order, counted = MixtureOrder(weights), Counter()
    for i in range(length):
        source, number = order.place(i)
        assert number == counted[source]  # the next one of that source
        counted[source] += 1
        found = [counted[k] for k in range(len(weights))]
        assert order.counts(i + 1) == found
        assert all(abs(n - (i + 1) * share) < 2 for n, share in zip(found, shares_of(weights), strict=True))
    assert order.counts(0) == [0] * len(weights)


@given(WEIGHTS, FAR, st.integers(1, 50))
def test_the_order_is_exact_far_into_a_run(weights, start, length):
    order = MixtureOrder(weights)
    counted = order.counts(start)
    for i in range(start, start + length):
        source, number = order.place(i)
        assert number == counted[source]
        counted[source] += 1
    assert order.counts(start + length) == counted
    assert sum(counted) == start + length
    error = [abs(n - sum(counted) * share) for n, share in zip(counted, shares_of(weights), strict=True)]
    assert max(error) < 2


@given(WEIGHTS, st.integers(1, 10**6), FAR)
def test_only_the_ratios_of_weights_count(weights, factor, i):
    assert MixtureOrder([weight * factor for weight in weights]).place(i) == MixtureOrder(weights).place(i)


@given(st.fractions(Fraction(1, 1000), Fraction(999, 1000), max_denominator=1000), FAR)
def test_two_sources_are_right_to_half_a_sample(share, n):
    first, second = MixtureOrder([share, 1 - share]).counts(n)
    assert first + second == n
    assert abs(first - n * share) <= Fraction(1, 2)


def test_the_spread_is_even():
    order = MixtureOrder([Fraction(7, 10), Fraction(3, 10)])
    places = [i for i in range(1000) if order.place(i)[0] == 1]
    assert {after - before for before, after in itertools.pairwise(places)} == {3, 4}
    assert order.counts(10**18) == [7 * 10**17, 3 * 10**17]
    many = MixtureOrder([Fraction(1)] * 8)
    assert all(sorted(many.place(8 * k + j)[0] for j in range(8)) == list(range(8)) for k in range(20))


@pytest.mark.parametrize("weights", [[], [Fraction(0)], [Fraction(1), Fraction(-1)]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="expected at least one, each above 0"):
        MixtureOrder(weights)

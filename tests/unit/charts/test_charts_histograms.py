"""Bins, axes and the chart of a histogram."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_v3.charts import histograms
from deepseek_v3.charts.svg import histogram_chart
from helpers.pages import Seen


def test_length_bins_follow_the_keys() -> None:
    lengths = np.random.default_rng(0).integers(0, 5000, 1000)
    keys = Counter(str(math.floor(math.log2(1 + length))) for length in lengths.tolist())
    histogram = histograms.length_histogram(keys, {})
    assert histogram is not None
    assert histogram.before == np.histogram(lengths, [*histogram.edges[:-1], histogram.edges[-1] - 0.5])[0].tolist()
    assert histogram.after == [0] * len(histogram.before)


numbers = st.dictionaries(
    st.floats(-1e6, 1e6).map(lambda value: float(f"{value:.2g}")) | st.integers(0, 99).map(float),
    st.integers(1, 1000),
    min_size=1,
    max_size=40,
)


@given(numbers, st.sampled_from(["score", "perplexity"]))
@example({0.0: 1, 6.8e-12: 1}, "score")
@example({0.0: 1, 6.8e-273: 1}, "score")
@example({0.0: 1, 5e-324: 1}, "score")
@example({-5e-324: 1, 5e-324: 1}, "score")
@example({1e-310: 1, 5e-324: 1}, "perplexity")
def test_number_bins_count_each_value_once_in_its_place(counts: dict[float, int], name: str) -> None:
    histogram = histograms.number_histogram(counts, {}, name)
    edges = np.array(histogram.edges)
    assert (np.diff(edges) > 0).all()
    assert len(histogram.before) == len(edges) - 1 <= 30
    assert sum(histogram.before) == sum(counts.values())
    slack = 1e-6 * np.abs(edges).max()
    for index, number in enumerate(histogram.before):
        within = [n for value, n in counts.items() if edges[index] - slack <= value <= edges[index + 1] + slack]
        assert number <= sum(within)
    assert len(histogram.ticks) <= 6


def test_scores_have_round_bins_up_to_one() -> None:
    scores = np.round(np.random.default_rng(0).uniform(0, 1, 500), 2)
    histogram = histograms.number_histogram({**Counter(scores.tolist()), 1.0: 7, 0.0: 1}, {0.5: 3}, "score")
    assert histogram.axis.name == "linear"
    np.testing.assert_allclose(histogram.edges, np.linspace(0, 1, 21), atol=1e-12)
    assert histogram.after[10] == 3


def test_small_counts_have_a_bin_each() -> None:
    histogram = histograms.number_histogram({0.0: 90, 1.0: 5, 2.0: 3, 7.0: 2}, {}, "pii")
    assert histogram.edges == [*range(9)]
    assert histogram.before == [90, 5, 3, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("values", "name", "scale"),
    [
        ([0.01, 1.0], "score", "linear"),
        ([-3.0, 5.0], "quality", "linear"),
        ([40.0, 90.0], "perplexity", "logarithmic"),
        ([1.0, 5000.0], "words", "logarithmic"),
        ([0.0, 5000.0], "replaced", "logarithmic"),
        ([0.0, 100.0], "percent", "linear"),
        ([0.0, 0.0], "nothing", "linear"),
    ],
)
def test_the_axis_depends_on_values_and_name(values: list[float], name: str, scale: str) -> None:
    histogram = histograms.number_histogram(dict.fromkeys(values, 1), {}, name)
    assert histogram.axis.name == scale


def test_no_documents_give_no_histogram() -> None:
    assert histograms.length_histogram({}, {}) is None


def test_only_finite_numbers_are_numeric() -> None:
    counts = {"nan": 4, "inf": 1, "en": 2, "0.93": 3, "1.2e+02": 1, "-5": 1, "not finite": 9, "1_0": 1}
    assert histograms.numeric_counts(counts) == {0.93: 3, 120.0: 1, -5.0: 1}


def test_words_beyond_the_most_frequent_are_added_up() -> None:
    before = {"en": 50, "de": 7, "fr": 7, "uk": 2, "nan": 1}
    assert histograms.word_counts(before, {"en": 40, "uk": 1}, 3) == [
        ("en", 50, 40),
        ("de", 7, 0),
        ("fr", 7, 0),
        ("2 others", 3, 1),
    ]


@given(st.dictionaries(st.integers(-50, 50), st.integers(1, 9), min_size=1))
def test_the_median_is_that_of_all_values(counts: dict[int, int]) -> None:
    values = np.repeat(list(counts), list(counts.values()))
    assert histograms.median(counts) == np.quantile(values, 0.5, method="inverted_cdf")
    assert histograms.median({}) is None


def test_a_chart_has_its_numbers_as_text_and_labels() -> None:
    histogram = histograms.number_histogram({1.0: 5, 2.0: 1234567}, {2.0: 1}, "score")
    chart = Seen(histogram_chart(histogram, "key", "Scores <b>", "All & sundry", str, "score"))
    assert "b" not in chart.tags
    labelled = chart.attributes[chart.tags.index("svg")]
    assert labelled["role"] == "img"
    assert labelled["aria-labelledby"] == "key-title key-desc"
    assert {"key-title", "key-desc"} <= {attributes.get("id") for attributes in chart.attributes}
    assert "1,234,567" in chart.text

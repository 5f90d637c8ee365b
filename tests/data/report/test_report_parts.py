"""The pieces of the report: escaping, numbers, bins, marked differences."""

import math
import random
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.charts import histograms
from deepseek_v3.charts.markup import Html, byte_size, element, escape, passage, slug, visible
from deepseek_v3.charts.style import STYLE
from deepseek_v3.charts.svg import histogram_chart
from deepseek_v3.data.report import drops
from deepseek_v3.data.report.duplicates import differences, occurrences
from deepseek_v3.utils.text import format_figure, format_percent, format_si, truncate


class Seen(HTMLParser):
    """What a parser finds: the elements that were opened, and the text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


any_text = st.text(st.characters() | st.sampled_from("<>&\"'\x00\r\u202e\ud800\u200b"))


@given(any_text)
def test_text_stays_text(text: str) -> None:
    seen = Seen(element("p", text, title=text))
    assert seen.tags == ["p"]
    assert seen.text == seen.attributes[0]["title"] == visible(text)


@given(any_text)
def test_what_is_visible_hides_and_reorders_nothing(text: str) -> None:
    shown = visible(text)
    assert not any(0xD800 <= ord(character) < 0xE000 for character in shown)
    assert not {*shown} & {*"\x00\x07\x1b\r\x7f\x85\u061c\u200b\u200e\u200f\u2028\u202a\u202e\u2066\u2069\ufeff"}
    assert visible(shown) == shown


def test_hidden_characters_are_named_by_their_codes() -> None:
    assert visible("a\x00b\u202ec\td\n") == "a[U+0000]b[U+202E]c\td\n"
    assert visible("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"  # joined, as their writers mean them


@given(any_text, st.lists(st.integers(0, 30), max_size=6))
def test_a_passage_is_its_text_whatever_is_marked(text: str, cuts: list[int]) -> None:
    cuts = sorted({min(cut, len(text)) for cut in cuts})
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    seen = Seen(passage(text, spans))
    assert seen.text == visible(text)
    assert {*seen.tags} <= {"div", "mark", "i"}
    assert seen.tags.count("mark") == len(spans)


def test_markup_is_escaped_once() -> None:
    assert escape(escape("a < b")) == "a &lt; b"
    assert element("p", Html("<b>x</b>"), "<b>") == "<p><b>x</b>&lt;b&gt;</p>"
    assert element("a", "x", class_="y", aria_label="z", href=None) == '<a class="y" aria-label="z">x</a>'
    assert slug("samples", "a/b <c>") == "samples-a-b-c"
    assert truncate("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 5, "0.0%"),
        (1, 3, "33.3%"),
        (5, 5, "100.0%"),
        (1, 10**6, "<0.1%"),
        (999_999, 10**6, ">99.9%"),
        (3, 2, "150.0%"),
        (1, 0, "–"),
    ],
)
def test_shares_round_neither_to_nothing_nor_to_all(part: int, whole: int, shown: str) -> None:
    assert format_percent(part, whole) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (217_512_345, "217.5 MB"),
        (10**21, "1000.0 EB"),
    ],
)
def test_sizes_have_units_of_thousands(number: int, shown: str) -> None:
    assert format_si(number, "B").replace("\u00a0", " ") == shown
    assert Seen(byte_size(number)).attributes == [{"value": str(number), "title": f"{number:,} bytes"}]


def test_figures_of_any_kind() -> None:
    values = [3, 0.31234, 1234.5, True, None, ["a", 2], "word", {"a": 1}]
    assert [format_figure(value) for value in values] == [
        "3",
        "0.3123",
        "1,234",
        "true",
        "none",
        "a, 2",
        "word",
        "{'a': 1}",
    ]
    assert len(format_figure("x" * 1000)) == 120


def test_bins_of_lengths_are_those_that_the_keys_name() -> None:
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
def test_bins_of_numbers_count_every_value_once_and_where_it_lies(counts: dict[float, int], name: str) -> None:
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
def test_axes_suit_their_values(values: list[float], name: str, scale: str) -> None:
    histogram = histograms.number_histogram(dict.fromkeys(values, 1), {}, name)
    assert histogram.axis.name == scale


def test_no_documents_have_no_lengths() -> None:
    assert histograms.length_histogram({}, {}) is None


def test_languages_are_no_numbers() -> None:
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


def test_a_chart_tells_its_numbers_to_those_who_do_not_see_it() -> None:
    histogram = histograms.number_histogram({1.0: 5, 2.0: 1234567}, {2.0: 1}, "score")
    chart = Seen(histogram_chart(histogram, "key", "Scores <b>", "All & sundry", str, "score"))
    assert "b" not in chart.tags
    labelled = chart.attributes[chart.tags.index("svg")]
    assert labelled["role"] == "img"
    assert labelled["aria-labelledby"] == "key-title key-desc"
    assert {"key-title", "key-desc"} <= {attributes.get("id") for attributes in chart.attributes}
    assert "1,234,567" in chart.text


def without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, stop in reversed(spans):
        text = text[:start] + " " + text[stop:]
    return " ".join(text.split())


@given(
    st.lists(st.sampled_from("a b c dog the . , 人 口\n\n".split(" "))),
    st.lists(st.sampled_from("a b dog 人 .".split())),
)
def test_what_is_not_marked_is_the_same_in_both(one: list[str], other: list[str]) -> None:
    texts = [" ".join(one), " ".join(other)]
    left, right = differences(*texts)
    assert without(texts[0], left) == without(texts[1], right)
    assert differences(texts[0], texts[0]) == ([], [])


def test_a_changed_word_is_marked_and_nothing_else() -> None:
    one = "The quick brown fox jumps over the lazy dog, again and again."
    left, right = differences(one, one.replace("quick brown", "slow   grey"))
    assert [one[start:stop] for start, stop in left] == ["quick brown"]
    assert right == [(4, 15)]
    assert differences("天地玄黄宇宙", "天地黄宇宙洪") == ([(2, 3)], [(5, 6)])


def test_triggers_are_found_in_any_case_and_across_lines() -> None:
    text = "Read more.\nREAD\n more (about) it"
    assert [text[start:stop] for start, stop in occurrences(text, "read more")] == ["Read more", "READ\n more"]
    assert [text[start:stop] for start, stop in occurrences(text, "( ABOUT )")] == ["(about)"]
    assert occurrences("{{{ x {", "{") == [(0, 3), (6, 7)]
    assert occurrences(text, " \n") == occurrences(text, "nowhere") == []


def test_random_texts_keep_their_words_in_order() -> None:
    chooser = random.Random(1)
    words = [chooser.choice("abcdefgh") for _ in range(300)]
    changed = [word.upper() if chooser.random() < 0.1 else word for word in words]
    left, _ = differences(" ".join(words), " ".join(changed))
    assert sum(stop - start + 1 for start, stop in left) // 2 >= sum(map(str.isupper, changed))


def luminance(colour: str) -> float:
    """As WCAG 2.2 defines relative luminance."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_from_their_grounds() -> None:
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in STYLE.split(":root {")[1:3]]
    assert [len(colours) for colours in schemes] == [12, 12]
    for colours in schemes:
        for names, ground, ratio in [
            (["ink", "soft", "after"], "paper", 4.5),
            (["ink", "soft", "alarm"], "panel", 4.5),
            (["ink", "alarm"], "alarm-area", 4.5),
            (["ink"], "mark", 4.5),
            (["before", "after", "other"], "paper", 3),
        ]:
            for name in names:
                lights = sorted([luminance(colours[name]), luminance(colours[ground])])
                assert (lights[1] + 0.05) / (lights[0] + 0.05) >= ratio, (name, ground)


def test_an_empty_file_alone_in_quarantine() -> None:
    assert "empty" in str(drops.quarantine_section({"quarantined": {"empty": 0}}))

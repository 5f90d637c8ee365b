"""HTML elements, escaping, formatted numbers and colours."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.charts.markup import Html, byte_size, element, escape, passage, slug, visible
from deepseek_v3.charts.style import STYLE
from deepseek_v3.utils.text import format_figure, format_percent, format_si, truncate
from helpers.pages import Seen

any_text = st.text(st.characters() | st.sampled_from("<>&\"'\x00\r\u202e\ud800\u200b"))


@given(any_text)
def test_text_stays_text(text: str) -> None:
    seen = Seen(element("p", text, title=text))
    assert seen.tags == ["p"]
    assert seen.text == seen.attributes[0]["title"] == visible(text)


@given(any_text)
def test_visible_text_hides_and_reorders_nothing(text: str) -> None:
    shown = visible(text)
    assert not any(0xD800 <= ord(character) < 0xE000 for character in shown)
    assert not {*shown} & {*"\x00\x07\x1b\r\x7f\x85\u061c\u200b\u200e\u200f\u2028\u202a\u202e\u2066\u2069\ufeff"}
    assert visible(shown) == shown


def test_hidden_characters_are_named_by_their_codes() -> None:
    assert visible("a\x00b\u202ec\td\n") == "a[U+0000]b[U+202E]c\td\n"
    assert visible("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"  # joined, as their writers mean them


@given(any_text, st.lists(st.integers(0, 30), max_size=6))
def test_a_passage_holds_its_whole_text(text: str, cuts: list[int]) -> None:
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
def test_percentages_round_neither_to_0_nor_to_100(part: int, whole: int, shown: str) -> None:
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


def luminance(colour: str) -> float:
    """As WCAG 2.2 defines relative luminance."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_enough_contrast() -> None:
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in STYLE.split(":root {")[1:3]]
    assert [len(colours) for colours in schemes] == [18, 18]
    for colours in schemes:
        for names, ground, ratio in [
            (["ink", "soft", "after"], "paper", 4.5),
            (["ink", "soft", "alarm"], "panel", 4.5),
            (["ink", "alarm"], "alarm-area", 4.5),
            (["ink"], "mark", 4.5),
            (["before", "after", "other", *(f"series-{letter}" for letter in "abcdef")], "paper", 3),
        ]:
            for name in names:
                lights = sorted([luminance(colours[name]), luminance(colours[ground])])
                assert (lights[1] + 0.05) / (lights[0] + 0.05) >= ratio, (name, ground)

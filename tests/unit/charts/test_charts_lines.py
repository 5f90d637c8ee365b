"""Line charts and heat maps: scales, thinning, markers, and pictures that a decoder reads."""

import math
import re
import struct
import zlib
from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.charts.axes import scale_of
from deepseek_v3.charts.heat_map import load_map
from deepseek_v3.charts.lines import LineStyle, Marker, Series, legend_of, line_chart
from helpers.pages import Seen

PLAIN = LineStyle("{:g}".format)
finite = st.floats(-1e30, 1e30)


@given(st.lists(finite, max_size=6), st.booleans(), st.booleans())
def test_a_scale_places_its_values_between_0_and_1(values: list[float], is_log: bool, from_zero: bool) -> None:
    scale = scale_of(values, is_log=is_log, from_zero=from_zero)
    assert all(0 <= scale.place(value) <= 1 for value in values)
    ticks = scale.ticks(4)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 6


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ([0, 10], False, [0, 2, 4, 6, 8, 10]),
        ([1.93, 2.11], False, [1.95, 2.0, 2.05, 2.1]),
        ([0.1, 1000], True, [0.1, 1, 10, 100, 1000]),
        ([1, 6], True, [1, 2, 3, 5]),
    ],
)
def test_ticks_are_round(values: list[float], is_log: bool, ticks: list[float]) -> None:
    assert scale_of(values, is_log=is_log).ticks(5) == pytest.approx(ticks)


def chart(*series: Series, style: LineStyle = PLAIN, markers: tuple[Marker, ...] = ()) -> Seen:
    made = line_chart("key", "Title", "Caption.", series, style, "{:g}".format, markers)
    assert made is not None
    return Seen(made)


def classes(seen: Seen) -> list[str]:
    return [each["class"] or "" for each in seen.attributes if "class" in each]


def test_values_that_are_not_finite_are_left_out() -> None:
    seen = chart(Series("a", [0, 1, 2, math.nan], [1, math.nan, 3, 4]))
    (line,) = [each for each in seen.attributes if each.get("class") == "line s0"]
    assert line["d"] == "M0 173.33L1000 6.6667"
    assert line_chart("key", "t", "c", [Series("a", [1], [math.nan])], PLAIN, str) is None


def test_long_lines_are_thinned_to_a_mean_and_a_band() -> None:
    seen = chart(Series("a", list(range(3000)), [number % 10 for number in range(3000)], colour=7))
    assert {"line s1", "band s1"} <= set(classes(seen))
    (line,) = [each for each in seen.attributes if each.get("class") == "line s1"]
    assert (line["d"] or "").count("L") == 299


def test_markers_and_tooltips_are_text() -> None:
    hostile = "</title><script>alert(1)</script>"
    seen = chart(Series(hostile, [0, 1], [0, 1]), markers=(Marker(0.5, hostile, "alarm"), Marker(7, "outside")))
    assert "script" not in seen.tags
    assert classes(seen).count("marker alarm") == 1
    assert "outside" not in seen.text
    assert "script" not in Seen(legend_of([hostile])).tags


def test_the_top_is_cut_where_the_first_values_tower() -> None:
    values = [11.0, *(2.0 + 0.01 * (number % 5) for number in range(200))]
    seen = chart(Series("a", list(range(201)), values), style=LineStyle("{:g}".format, cuts_top=True))
    assert seen.text.split("Caption.")[1].startswith("22.022.04")


def test_a_heat_map_is_a_png_with_a_row_for_each_row() -> None:
    seen = Seen(load_map("Load", "Caption.", [[0, 1, 3, 9], [0.5, 1, 1, 1]], lambda row: f"row {row}"))
    assert "row 0row 1" in seen.text
    (picture,) = [each for each in seen.attributes if "src" in each]
    data = b64decode((picture["src"] or "").removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (4, 2)
    packed = re.search(rb"IDAT(.*).{4}.{4}IEND", data, re.DOTALL)
    assert packed is not None
    assert zlib.decompress(packed[1]) == bytes([0, 201, 100, 200, 200, 0, 50, 100, 100, 100])

"""Charts as inline SVG. They fill the width of the page, and their text keeps the size of the page's text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from deepseek_v3.charts.histograms import Histogram
from deepseek_v3.charts.markup import Html, TableBody, concat, element, html_table
from deepseek_v3.utils.text import format_integer, format_si

_PLOT = 180  # pixels from the axis to the top
_TOP, _BELOW = 10, 26  # pixels above the plot, and below it for the ticks
_GRID_LINES = 4


def bar(*parts: tuple[str, float]) -> Html:
    """A horizontal bar of parts, each with a CSS class and a share of the whole. Hidden from screen readers."""
    rectangles = []
    start = 0.0
    for class_, share in parts:
        if share > 0:
            rectangles.append(
                element("rect", class_=class_, x=_percent(start), width=_percent(share), height="100%")
            )
        start += share
    return element("svg", *rectangles, class_="bar", aria_hidden="true")


def before_after_bars(before: float, after: float) -> Html:
    """Two thin bars, one above the other, with lengths as shares of the longest bar."""
    return element(
        "svg",
        element("rect", class_="before", width=_percent(before), height="44%"),
        element("rect", class_="after", width=_percent(after), height="44%", y="56%"),
        class_="bar",
        aria_hidden="true",
    )


def legend() -> Html:
    """The legend of the colours of before and after."""
    return element("p", _key("before"), " before ", _key("after"), " after", class_="legend")


def histogram_chart(
    histogram: Histogram, key: str, title: str, caption: str, edge: Callable[[float], str], unit: str
) -> Html:
    """A histogram of the values before (area) and after (bars), with a caption and a table of its numbers.

    `key` is its HTML id, `edge` formats the limit of a bin, and `unit` names the values.
    """
    ranges = [
        f"{edge(low)} – {edge(high)}" for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)
    ]
    rows = list(zip(ranges, histogram.before, histogram.after, strict=True))
    most = max(*histogram.before, *histogram.after)
    top = _nice_top(most)
    description = f"{len(rows)} bins on a {histogram.axis.name} axis; the largest holds {most:,} documents."
    chart = element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", f"{caption} {description}", id=f"{key}-desc"),
        _grid(top),
        _plot(histogram, top),
        _ticks(histogram, edge),
        _hints(rows),
        class_="chart",
        role="img",
        height=_TOP + _PLOT + _BELOW,
        aria_labelledby=f"{key}-title {key}-desc",
    )
    numbers = html_table(
        title,
        [f"{unit}, from – below", "before", "after"],
        TableBody([(name, format_integer(before), format_integer(after)) for name, before, after in rows]),
    )
    return element(
        "figure",
        element("h4", title),
        chart,
        element("figcaption", caption),
        element("details", element("summary", "Numbers"), numbers, class_="numbers"),
    )


def _grid(top: int) -> Html:
    """Horizontal grid lines from 0 to `top`, labelled with counts on the left."""
    lines = []
    for step in range(_GRID_LINES + 1):
        y = _TOP + _PLOT - _PLOT * step / _GRID_LINES
        lines.append(element("line", class_="grid", x1="0", x2="100%", y1=_short(y), y2=_short(y)))
        label = format_si(top * step / _GRID_LINES, "").replace(".0", "")
        lines.append(element("text", label, x=-8, y=_short(y + 4), text_anchor="end"))
    return concat(lines)


def _plot(histogram: Histogram, top: int) -> Html:
    """The shapes of the histogram; x counts bins and is stretched to the width of the chart, y is in pixels."""
    before = [_PLOT - _PLOT * number / top for number in histogram.before]
    after = [_PLOT - _PLOT * number / top for number in histogram.after]
    return element(
        "svg",
        element("path", class_="before-area", d=_steps(before) + "Z"),
        element("path", class_="after", d="".join(_block(index, y) for index, y in enumerate(after) if y < _PLOT)),
        element("path", class_="before-line", d=_steps(before), vector_effect="non-scaling-stroke"),
        y=_TOP,
        width="100%",
        height=_PLOT,
        viewBox=f"0 0 {len(before)} {_PLOT}",
        preserveAspectRatio="none",
    )


def _steps(heights: Sequence[float]) -> str:
    """The outline of adjacent bars, starting and ending at the axis."""
    return f"M0 {_PLOT}" + "".join(f"V{_short(y)}H{index + 1}" for index, y in enumerate(heights)) + f"V{_PLOT}"


def _block(index: int, y: float) -> str:
    return f"M{index + 0.06:g} {_PLOT}V{_short(y)}H{index + 0.94:g}V{_PLOT}Z"


def _ticks(histogram: Histogram, edge: Callable[[float], str]) -> Html:
    bins = len(histogram.before)
    ticks = []
    for index in histogram.ticks:
        x = _percent(index / bins)
        bottom = _TOP + _PLOT
        ticks.append(element("line", class_="tick", x1=x, x2=x, y1=bottom, y2=bottom + 5))
        ticks.append(element("text", edge(histogram.edges[index]), x=x, y=bottom + 20, text_anchor="middle"))
    return concat(ticks)


def _hints(rows: Sequence[tuple[str, int, int]]) -> Html:
    """Invisible rectangles whose tooltips give the numbers of each bin."""
    return concat(
        element(
            "rect",
            element("title", f"{name}: {before:,} before, {after:,} after"),
            class_="hint",
            x=_percent(index / len(rows)),
            width=_percent(1 / len(rows)),
            y=_TOP,
            height=_PLOT,
        )
        for index, (name, before, after) in enumerate(rows)
    )


def _nice_top(most: int) -> int:
    """A round number of at least `most` that is easy to divide by four."""
    power = 10 ** max(math.floor(math.log10(most)) - 1, 0) if most else 1
    return next(top * power for top in (4, 8, 12, 16, 20, 24, 32, 40, 60, 80, 100) if top * power >= most)


def _key(class_: str) -> Html:
    swatch = element("rect", class_=class_, width="100%", height="100%")
    return element("svg", swatch, class_="key", aria_hidden="true")


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _short(number: float) -> str:
    return f"{number:.5g}"

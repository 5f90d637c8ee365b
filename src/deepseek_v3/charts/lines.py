"""Line charts as inline SVG: several series over one axis, with bands, markers and tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles

from deepseek_v3.charts.axes import Scale, scale_of
from deepseek_v3.charts.markup import Html, concat, element

NUM_COLOURS = 6  # after these, colours repeat
_MOST_POINTS = 300  # of a line; more are averaged
_HINTS = 60  # columns with tooltips
_TOP, _PLOT, _BELOW = 10, 180, 26  # pixels above the plot, of the plot, and below it for the ticks
_WIDTH = 1000  # of the coordinates inside the plot, which is stretched to the page
_X_TICKS, _Y_TICKS = 6, 4
_ROOM = 0.04  # of the vertical axis, below and above the values


@dataclass(frozen=True)
class Series:
    """A line through the finite points of `x` and `y`, in the order of `x`.

    `colour` counts the colours of the page from 0. `low` and `high` limit a band around the line. Series that are
    `dotted` show their points. A `dashed` line shows what is only expected.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dotted: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Marker:
    """A vertical line at `x` for an event, with its text. `kind` is `alarm` or `event`."""

    x: float
    text: str
    kind: str = "event"


@dataclass(frozen=True)
class LineStyle:
    """How the vertical axis is scaled and labelled.

    `cuts_top`: the axis ends where 98% of the values are, because the first ones are far above the rest.
    """

    show: Callable[[float], str]
    is_log: bool = False
    from_zero: bool = False
    cuts_top: bool = False


def line_chart(
    key: str,
    title: str,
    caption: str,
    series: Sequence[Series],
    style: LineStyle,
    show_x: Callable[[float], str],
    markers: Sequence[Marker] = (),
) -> Html | None:
    """A chart of the series; `key` is its HTML id. None if no series has a finite point."""
    lines = [line for line in (_thinned(each) for each in series) if line.x]
    if not lines:
        return None
    across = scale_of([x for line in lines for x in (line.x[0], line.x[-1])])
    upward = _upward(lines, style)
    chart = element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", caption, id=f"{key}-desc"),
        _grid(upward, style.show),
        _x_ticks(across, show_x),
        _plot(lines, across, upward),
        _markers(markers, across),
        _hints(lines, across, style.show, show_x),
        class_="chart",
        role="img",
        height=_TOP + _PLOT + _BELOW,
        aria_labelledby=f"{key}-title {key}-desc",
    )
    return element("figure", element("h4", title), chart, element("figcaption", caption))


def legend_of(names: Sequence[str]) -> Html:
    """The colours of several series by name."""
    keys = [
        element("span", _key(number), " ", element("bdi", name), class_="entry")
        for number, name in enumerate(names)
    ]
    return element("p", *keys, class_="legend")


def _thinned(series: Series) -> Series:
    """The finite points of a series; if there are too many, the means of neighbours, with a band of their range."""
    rows = [
        (x, y, low, high)
        for x, y, low, high in zip(series.x, series.y, series.low or series.y, series.high or series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    size = -(-len(rows) // _MOST_POINTS) or 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    has_band = size > 1 or series.low is not None
    return Series(
        series.name,
        [fmean(row[0] for row in group) for group in groups],
        [fmean(row[1] for row in group) for group in groups],
        series.colour,
        [min(row[2] for row in group) for group in groups] if has_band else None,
        [max(row[3] for row in group) for group in groups] if has_band else None,
        series.dotted,
        series.dashed,
    )


def _upward(lines: Sequence[Series], style: LineStyle) -> Scale:
    values = [y for line in lines for y in (*line.y, *(line.low or ()), *(line.high or ()))]
    if style.cuts_top and len(values) >= 50:
        highest = quantiles([y for line in lines for y in line.y], n=50)[-1]
        values = [value for value in values if value <= highest]
    scale = scale_of(values, is_log=style.is_log, from_zero=style.from_zero)
    room = 0.0 if style.is_log else _ROOM * (scale.high - scale.low)
    return replace(scale, low=scale.low if style.from_zero else scale.low - room, high=scale.high + room)


def _grid(upward: Scale, show: Callable[[float], str]) -> Html:
    parts = [_grid_line(_TOP + _PLOT)]
    for value in upward.ticks(_Y_TICKS):
        y = _TOP + _PLOT * (1 - upward.place(value))
        parts += [_grid_line(y), element("text", show(value), x=-8, y=_short(y + 4), text_anchor="end")]
    return concat(parts)


def _grid_line(y: float) -> Html:
    return element("line", class_="grid", x1="0", x2="100%", y1=_short(y), y2=_short(y))


def _x_ticks(across: Scale, show: Callable[[float], str]) -> Html:
    bottom, parts = _TOP + _PLOT, []
    for value in across.ticks(_X_TICKS):
        x = _percent(across.place(value))
        parts.append(element("line", class_="tick", x1=x, x2=x, y1=bottom, y2=bottom + 5))
        parts.append(element("text", show(value), x=x, y=bottom + 20, text_anchor="middle"))
    return concat(parts)


def _plot(lines: Sequence[Series], across: Scale, upward: Scale) -> Html:
    """Bands below all lines; x and y are stretched from a plot of 1000 units to the width of the chart."""

    def points(line: Series, values: Sequence[float]) -> list[str]:
        return [
            f"{_short(_WIDTH * across.place(x))} {_short(_PLOT * (1 - upward.place(y)))}"
            for x, y in zip(line.x, values, strict=True)
        ]

    bands = [
        element("path", class_=f"band s{line.colour % NUM_COLOURS}", d=f"M{'L'.join(outline)}Z")
        for line in lines
        if line.low is not None and line.high is not None
        for outline in [points(line, line.high) + points(line, line.low)[::-1]]
    ]
    drawn = [
        element(
            "path",
            class_=f"line s{line.colour % NUM_COLOURS}{' dashed' if line.dashed else ''}",
            d=f"M{'L'.join(points(line, line.y))}" + ("h0" if len(line.x) == 1 else ""),
            vector_effect="non-scaling-stroke",
        )
        for line in lines
    ]
    dots = [
        element(
            "path",
            class_=f"dots s{line.colour % NUM_COLOURS}",
            d="".join(f"M{point}h0" for point in points(line, line.y)),
            vector_effect="non-scaling-stroke",
        )
        for line in lines
        if line.dotted or len(line.x) == 1
    ]
    return element(
        "svg",
        *bands,
        *drawn,
        *dots,
        y=_TOP,
        width="100%",
        height=_PLOT,
        viewBox=f"0 0 {_WIDTH} {_PLOT}",
        preserveAspectRatio="none",
    )


def _markers(markers: Iterable[Marker], across: Scale) -> Html:
    inside = [marker for marker in markers if across.low <= marker.x <= across.high]
    return concat(
        element(
            "line",
            element("title", marker.text),
            class_=f"marker {'alarm' if marker.kind == 'alarm' else 'event'}",
            x1=_percent(across.place(marker.x)),
            x2=_percent(across.place(marker.x)),
            y1=_TOP,
            y2=_TOP + _PLOT,
        )
        for marker in inside
    )


def _hints(
    lines: Sequence[Series], across: Scale, show: Callable[[float], str], show_x: Callable[[float], str]
) -> Html:
    """Invisible columns whose tooltips give the value of each line at the point nearest to their middle."""
    parts = []
    for column in range(_HINTS):
        middle = across.low + (column + 0.5) / _HINTS * (across.high - across.low)
        texts = []
        for line in lines:
            index = min(range(len(line.x)), key=lambda number, line=line: abs(line.x[number] - middle))  # type: ignore[misc]
            texts.append(f"{line.name}: {show(line.y[index])} at {show_x(line.x[index])}")
        parts.append(
            element(
                "rect",
                element("title", "\n".join(texts)),
                class_="hint",
                x=_percent(column / _HINTS),
                width=_percent(1 / _HINTS),
                y=_TOP,
                height=_PLOT,
            )
        )
    return concat(parts)


def _key(colour: int) -> Html:
    swatch = element("rect", class_=f"swatch s{colour % NUM_COLOURS}", width="100%", height="100%")
    return element("svg", swatch, class_="key", aria_hidden="true")


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _short(number: float) -> str:
    return f"{number:.5g}"

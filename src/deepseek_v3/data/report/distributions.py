"""Histograms for the report: the lengths of documents, and the values that stages observed."""

from __future__ import annotations

import math
from typing import Any

from deepseek_v3.charts import histograms
from deepseek_v3.charts.markup import Html, TableBody, concat, element, html_table
from deepseek_v3.charts.svg import before_after_bars, histogram_chart, legend
from deepseek_v3.data.report.overview import stage_title
from deepseek_v3.utils.text import format_figure, format_integer, format_percent, humanize, truncate

_WORDS = 15
_WORD_CHARACTERS = 40


def distributions_section(stats: dict[str, Any]) -> Html:
    """One chart for the lengths, and one for each observed quantity."""
    charts = [_lengths(stats)]
    for number, stage in enumerate(stats.get("stages", [])):
        for index, (quantity, counts) in enumerate(sorted(stage.get("observed", {}).items())):
            title = _title(stage["name"], quantity)
            charts.append(_observed(f"observed-{number}-{index}", title, quantity, counts))
    shown = [chart for chart in charts if chart]
    if not shown:
        return element("p", "Nothing was observed.")
    return concat([legend(), element("div", *shown, class_="charts")])


def _title(stage: str, quantity: str) -> str:
    return stage_title(stage) if stage == quantity else f"{stage_title(stage)}: {humanize(quantity)}"


def _lengths(stats: dict[str, Any]) -> Html | None:
    read, kept = stats.get("read", {}), stats.get("kept", {})
    histogram = histograms.length_histogram(read.get("lengths", {}), kept.get("lengths", {}))
    if histogram is None:
        return None
    means = [
        _mean(read.get("bytes", 0), read.get("documents", 0)),
        _mean(kept.get("bytes", 0), sum(kept.get("lengths", {}).values())),
    ]
    caption = f"UTF-8 bytes of text, as read and as written; on average {means[0]} before, {means[1]} after."
    return histogram_chart(histogram, "lengths", "Length of documents", caption, _bytes, "bytes")


def _observed(key: str, title: str, quantity: str, counts: dict[str, Any]) -> Html | None:
    """The values of all documents that a stage received, and of those that it kept."""
    before, after = counts.get("before", {}), counts.get("after", {})
    numbers = histograms.numeric_counts(before)
    if not numbers:
        return _words(title, before, after) if before else None
    histogram = histograms.number_histogram(numbers, histograms.numeric_counts(after), quantity)
    caption = _number_caption(before, after)
    return histogram_chart(histogram, key, title, caption, _edge, humanize(quantity))


def _number_caption(before: dict[str, int], after: dict[str, int]) -> str:
    medians = [histograms.median(histograms.numeric_counts(counts)) for counts in (before, after)]
    was, is_ = (format_figure(middle) if middle is not None else "none" for middle in medians)
    left_out = sum(before.values()) - sum(histograms.numeric_counts(before).values())
    odd = f" {left_out:,} more have no finite number." if left_out else ""
    came, went = (format_integer(sum(histograms.numeric_counts(counts).values())) for counts in (before, after))
    return f"{came} documents before the stage, {went} after it; median {was} before, {is_} after.{odd}"


def _words(title: str, before: dict[str, int], after: dict[str, int]) -> Html:
    rows = histograms.word_counts(before, after, _WORDS)
    most = max(max(row[1:]) for row in rows)
    total = sum(before.values())
    body = [
        (
            element("bdi", truncate(word, _WORD_CHARACTERS)),
            before_after_bars(was / most, is_ / most),
            format_integer(was),
            format_percent(was, total),
            format_integer(is_),
            format_percent(is_, was),
        )
        for word, was, is_ in rows
    ]
    header = ["", "", "before", "share", "after", "kept"]
    return element("figure", element("h4", title), html_table(title, header, TableBody(body)), class_="words")


def _bytes(edge: float) -> str:
    """The first length of a bin; from 1 KiB on it is rounded to a power of two."""
    size, units = round(edge), ["B", "KiB", "MiB", "GiB", "TiB"]
    if size < 1023:
        return f"{size} B"
    power = (size + 1).bit_length() - 1
    return f"{2 ** (power % 10):,} {units[power // 10]}"


def _edge(edge: float) -> str:
    nearest = round(edge)
    return format_figure(nearest if math.isclose(edge, nearest) else float(f"{edge:.3g}"))


def _mean(num_bytes: int, documents: int) -> str:
    return f"{num_bytes / documents:,.0f}" if documents else "none"

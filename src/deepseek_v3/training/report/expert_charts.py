"""How evenly the experts of a run are used: lines over all layers, and heat maps of layers and experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from deepseek_v3.charts.heat_map import heat_legend, load_map
from deepseek_v3.charts.lines import LineStyle, Series, line_chart
from deepseek_v3.charts.markup import Html, concat, element, slug
from deepseek_v3.moe.balance import decode_load
from deepseek_v3.training.report.curves import markers_of
from deepseek_v3.training.report.run_files import Run
from deepseek_v3.training.report.summary import tokens_of

_MOST_COLUMNS = 150  # of a heat map; of more records some are left out

_FIGURES: dict[str, tuple[str, str, LineStyle]] = {
    "experts/entropy": (
        "Entropy of the load",
        "Over its maximum: 1 is even. Line: mean over layers; band: all layers.",
        LineStyle("{:.3f}".format),
    ),
    "experts/max_violation": (
        "MaxVio",
        "Largest load over the mean load, minus 1: 0 is even. Line: mean over layers; band: all layers.",
        LineStyle("{:.2f}".format, from_zero=True),
    ),
    "experts/utilisation": (
        "Experts used",
        "Share of experts with any token in the step; the others are dead. Line: mean of layers; band: all layers.",
        LineStyle("{:.1%}".format),
    ),
}


def experts_section(runs: Sequence[Run]) -> Html:
    """Lines for all runs, then the heat maps of each run."""
    routed = [run for run in runs if run.has("experts/entropy")]
    if not routed:
        return element("p", "No run has experts.")
    markers = [marker for run in runs for marker in markers_of(run)]
    charts = [
        line_chart(slug(name), title, caption, _over_layers(runs, name), style, tokens_of, markers)
        for name, (title, caption, style) in _FIGURES.items()
    ]
    drift = "Smallest and largest routing bias of all layers. They grow while the router fights the balance."
    charts.append(
        line_chart("bias", "Bias drift", drift, _biases(runs), LineStyle("{:.3g}".format), tokens_of, markers)
    )
    shown = [chart for chart in charts if chart is not None]
    return concat([element("div", *shown, class_="charts"), *map(_heat_maps, routed)])


def _over_layers(runs: Sequence[Run], name: str) -> list[Series]:
    def of_layers(rows: Sequence[Sequence[float]], combine: Callable[[Sequence[float]], float]) -> list[float]:
        return [combine(row) if row else math.nan for row in rows]

    found = []
    for colour, run in enumerate(runs):
        rows = run.layers(name)
        ends = of_layers(rows, min), of_layers(rows, max)
        found.append(Series(run.name, run.values("tokens"), of_layers(rows, fmean), colour, *ends))
    return found


def _biases(runs: Sequence[Run]) -> list[Series]:
    return [
        Series(f"{run.name}, {name}", run.values("tokens"), values, colour)
        for colour, run in enumerate(runs)
        for name, values in (
            ("smallest", [min(row, default=math.nan) for row in run.layers("experts/bias_min")]),
            ("largest", [max(row, default=math.nan) for row in run.layers("experts/bias_max")]),
        )
    ]


def _heat_maps(run: Run) -> Html:
    """The load of the busiest expert by layer, and the load of every expert of each layer."""
    rows = [row for row in run.layers("experts/max_violation") if row]
    busiest = [[1 + value for value in column] for column in zip(*_thin(rows), strict=True)]
    first = load_map(
        "Busiest expert of each layer",
        "Rows: MoE layers, the first on top; columns: the run. Fullest orange: three times the mean load.",
        busiest,
        str,
    )
    loads = _thin(_loads(run))
    layers = [
        load_map(
            f"MoE layer {layer}",
            f"Load of each of {len(loads[0][layer])} experts over the mean.",
            list(zip(*(record[layer] for record in loads), strict=True)),
            str,
        )
        for layer in range(len(loads[0]) if loads else 0)
    ]
    heading = element("h3", "Load over time: ", element("bdi", run.name))
    return concat([heading, heat_legend(), first, element("div", *layers, class_="charts")])


def _loads(run: Run) -> list[list[list[float]]]:
    """The recorded loads over their mean, by record, layer and expert; records of another shape are left out."""
    found: list[list[list[float]]] = []
    for record in run.steps:
        text, layers = record.get("experts/load"), record.get("experts/entropy")
        if not isinstance(text, str) or not isinstance(layers, list) or not layers:
            continue
        try:
            load = decode_load(text, len(layers))
        except ValueError:
            continue
        if not found or [len(row) for row in load] == [len(row) for row in found[0]]:
            found.append(load)
    return found


def _thin(records: Sequence[list]) -> list:  # type: ignore[type-arg]
    """At most `_MOST_COLUMNS` of the records, evenly spaced."""
    return list(records[:: -(-len(records) // _MOST_COLUMNS) or 1])

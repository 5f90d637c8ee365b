"""Draws the loss curve of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_v3.utils.files import atomic_write

_TRAIN, _MTP, _HOLDOUT, _BASELINE = "#1f5fa8", "#8a6fb3", "#d1495b", "#5f6770"
# Unlike the colours above, in the order in which sources take them.
_SOURCES = ("#e08a1e", "#2a9d5c", "#17a2b8", "#8c564b", "#c77cc0", "#9aa11c", "#7fb2e5")
_SOURCE = "holdout_loss/"  # before the name of a source
_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))

Curve = tuple[list[float], list[float]]


def plot_losses(
    records: Sequence[Mapping[str, Any]], path: Path, baselines: Mapping[str, float] | None = None
) -> None:
    """Draws training and held-out loss (nats per token) over tokens as a PNG at `path`.

    `records` are those of metrics.jsonl: `tokens` with any of `loss`, `mtp_loss`, `holdout_loss`, and the
    `holdout_loss/NAME` of the sources of a mixture; missing and non-finite values are skipped. `baselines` gives
    losses, by name, to draw as dashed lines.
    Raises ValueError if no record holds tokens and a finite loss.
    """
    train, mtp, holdout = (_curve(records, name) for name in ("loss", "mtp_loss", "holdout_loss"))
    if not has_losses(records):
        raise ValueError(f"nothing to plot: none of the {len(records)} records holds tokens and a finite loss")
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, unit_name = _unit(max(train[0] + holdout[0]))
    _draw_raw_and_smoothed(axes, train, unit, _TRAIN, "training")
    _draw_raw_and_smoothed(axes, mtp, unit, _MTP, "training, multi-token")
    _draw_holdout(axes, holdout, unit)
    _draw_sources(axes, records, unit)
    _draw_baselines(axes, baselines or {})
    _label(axes, unit_name)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


def has_losses(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any record holds tokens and a finite training or held-out loss."""
    return any(_curve(records, name)[0] for name in ("loss", "holdout_loss"))


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Tokens and values of the records that hold both."""
    points = [
        (record["tokens"], record[name])
        for record in records
        if _is_finite(record.get("tokens")) and _is_finite(record.get(name))
    ]
    return [tokens for tokens, _ in points], [value for _, value in points]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _unit(most_tokens: float) -> tuple[float, str]:
    return next(((size, name) for size, name in _UNITS if most_tokens >= size), (1.0, ""))


def _smoothed(values: list[float]) -> list[float]:
    """Means over a centred window of a twentieth of the curve, narrower at the steep start so as not to lag."""
    sums = [0.0, *accumulate(values)]
    widest = len(values) // 40
    smooth = []
    for index in range(len(values)):
        half = min(widest, index)
        start, stop = index - half, min(index + half + 1, len(values))
        smooth.append((sums[stop] - sums[start]) / (stop - start))
    return smooth


def _draw_raw_and_smoothed(axes: Axes, curve: Curve, unit: float, color: str, name: str) -> None:
    if not curve[0]:
        return
    tokens = [count / unit for count in curve[0]]
    marker = "o" if len(tokens) == 1 else ""  # a line of one point would not show
    axes.plot(tokens, curve[1], color=color, alpha=0.35, linewidth=0.8)
    axes.plot(tokens, _smoothed(curve[1]), color=color, linewidth=1.8, marker=marker, label=name)


def _draw_holdout(axes: Axes, curve: Curve, unit: float) -> None:
    if curve[0]:
        tokens = [count / unit for count in curve[0]]
        axes.plot(tokens, curve[1], color=_HOLDOUT, linewidth=1.2, marker="o", markersize=4, label="held-out")


def _draw_sources(axes: Axes, records: Sequence[Mapping[str, Any]], unit: float) -> None:
    """Draws the held-out loss of each source of a mixture as a thin line."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith(_SOURCE))
    for number, name in enumerate(names):
        tokens, losses = _curve(records, name)
        if tokens:
            scaled, label = [count / unit for count in tokens], f"held-out {name.removeprefix(_SOURCE)}"
            axes.plot(
                scaled,
                losses,
                color=_SOURCES[number % len(_SOURCES)],
                linewidth=0.9,
                marker=".",
                markersize=4,
                label=label,
            )


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Draws dashed lines, with names in the right margin; names that would overlap are moved apart."""
    for value in baselines.values():
        axes.axhline(value, color=_BASELINE, linewidth=1, linestyle="--", zorder=1)
    bottom, top = axes.get_ylim()
    previous = -math.inf
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        height = max((value - bottom) / (top - bottom), previous + 0.045)  # as a fraction of the axes' height
        axes.text(
            1.01, height, f"{name} {value:.2f}", transform=axes.transAxes, va="center", color=_BASELINE, fontsize=9
        )
        previous = height


def _label(axes: Axes, unit_name: str) -> None:
    axes.set_title("Loss over training", loc="left", fontweight="bold")
    axes.set_xlabel(f"tokens ({unit_name})" if unit_name else "tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    # In the row of the title, the legend covers neither curves nor baselines.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)

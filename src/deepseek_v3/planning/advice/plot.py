"""Plots the advice of `dsv3 plan`: expected loss against training compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from deepseek_v3.planning.advice.advisor import LOSS_SOURCE, Advice
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.advice.size_plan import SizePlan
from deepseek_v3.planning.chinchilla import MAX_RATIO, TARGET_RATIO
from deepseek_v3.planning.scaling_laws import expected_loss, training_compute
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import atomic_write

_FITS, _UNFIT, _BEST, _LIMIT, _LAW, _CURVE = "#1f5fa8", "#8a939d", "#d1495b", "#5f6770", "#d99a2b", "#b9c6d6"
_RATIOS = ((TARGET_RATIO, "-"), (MAX_RATIO, "--"))
_FROM, _TO, _POINTS = 5, 100, 60  # tokens per active parameter along a size's curve


def plot_plan(advice: Advice, path: Path) -> None:
    """Writes a PNG to `path` with each size at its planned tokens, its curve over other numbers, and the budget.

    Raises ConfigError if no size has an expected loss.
    """
    rows = [row for row in advice.rows if row.loss]
    if not rows:
        raise ConfigError("--plot: no size here has an expected loss; choose another folder with --configs")
    figure = Figure(figsize=(10, 6.25), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    _draw_laws(axes, rows)
    names = [_draw_size(axes, row, row is advice.recommended) for row in rows]
    _draw_budget(axes, advice)
    _label(axes, advice.request)
    figure.supxlabel(_source(advice.rows), x=0.01, ha="left", fontsize=6.5, color=_LIMIT)
    _keep_apart(figure, names)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


def _draw_laws(axes: Axes, rows: Sequence[SizePlan]) -> None:
    """Draws a curve per size over its tokens, and a line over all sizes per tokens-per-parameter ratio."""
    for row in rows:
        ratios = [_FROM * (_TO / _FROM) ** (step / (_POINTS - 1)) for step in range(_POINTS)]
        axes.plot(*_curve([(row, ratio) for ratio in ratios]), color=_CURVE, linewidth=1.5, zorder=1)
    everywhere = [
        *_curve([(row, ratio) for row in rows for ratio in (_FROM, _TO)])[0],
        *(row.compute for row in rows),
    ]
    axes.set_xlim(min(everywhere) / 2, 2 * max(everywhere))
    for ratio, style in _RATIOS:
        axes.plot(*_curve([(row, ratio) for row in rows]), style, color=_LAW, linewidth=1.2, zorder=2)


def _curve(points: Sequence[tuple[SizePlan, float]]) -> tuple[list[float], list[float]]:
    """Compute and expected loss of pairs of a size and a number of tokens per active parameter."""
    trained = [(row.config.model, ratio * row.active_parameters) for row, ratio in points]
    compute = [training_compute(model, tokens) for model, tokens in trained]
    return compute, [expected_loss(model, tokens).value for model, tokens in trained]


def _draw_size(axes: Axes, row: SizePlan, best: bool) -> Annotation:
    """Draws a size's point and error bar; returns its label, which is placed below the bar."""
    assert row.loss, "only sizes with a loss are drawn"
    color = _BEST if best else _FITS if row.fits else _UNFIT
    axes.errorbar(
        row.compute,
        row.loss.value,
        yerr=[[row.loss.value - row.loss.low], [row.loss.high - row.loss.value]],
        fmt="*" if best else "o",
        markersize=14 if best else 7,
        color=color,
        markerfacecolor=color if row.fits else "white",
        elinewidth=1.4,
        capsize=3,
        zorder=4 if best else 3,
    )
    return axes.annotate(
        row.name,
        (row.compute, row.loss.low),
        xytext=(-5, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=color,
        fontsize=10,
        fontweight="bold" if best else "normal",
        parse_math=False,
    )


def _draw_budget(axes: Axes, advice: Advice) -> None:
    """Draws the operations that the budget buys at the speed of the recommended, or else the fastest, size."""
    request = advice.request
    timed = [row for row in advice.rows if row.loss and row.layout]
    if not timed or not request.budgets:
        return
    row = advice.recommended if advice.recommended in timed else max(timed, key=_operations_per_second)
    assert row.layout, "only sizes with a layout are timed"
    compute = _operations_per_second(row) * request.seconds(row.layout.devices)
    low, high = min(axes.get_xlim()[0], compute / 2), max(axes.get_xlim()[1], 2 * compute)
    axes.set_xlim(low, high)
    axes.axvline(compute, color=_LIMIT, linewidth=1.2, linestyle=":", zorder=0)
    on_left = compute > low**0.25 * high**0.75  # in the last quarter
    axes.annotate(
        f"{' and '.join(request.budgets)}:\n{_power(compute)} FLOPs\nat the speed of {row.name}",
        (compute, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if on_left else 6, -4),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="top",
        color=_LIMIT,
        fontsize=9,
    )


def _operations_per_second(row: SizePlan) -> float:
    return row.compute / (3600 * row.cost.hours) if row.cost else 0.0


def _power(number: float) -> str:
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits} × 10$^{{{int(exponent)}}}$"


def _label(axes: Axes, request: PlanRequest) -> None:
    title = f"What {request.devices:,} × {request.device.name} can train"
    axes.set_title(title, loc="left", fontweight="bold", pad=10, parse_math=False)
    axes.set_xlabel("training compute (FLOPs: 6 × active parameters × tokens)")
    axes.set_ylabel("expected loss (nats per token)")
    axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=_legend(), loc="lower left", framealpha=1, edgecolor="white", fontsize=9)


def _legend() -> list[Line2D]:
    points: list[dict[str, Any]] = [
        {"color": _BEST, "marker": "*", "markersize": 10, "label": "recommended"},
        {"color": _FITS, "marker": "o", "markersize": 7, "label": "fits"},
        {"color": _UNFIT, "marker": "o", "markersize": 7, "label": "does not fit", "markerfacecolor": "white"},
    ]
    ratios = [(_LAW, style, f"{ratio}") for ratio, style in _RATIOS] + [(_CURVE, "-", f"{_FROM} to {_TO}")]
    lines: list[dict[str, Any]] = [
        {"color": color, "linestyle": style, "label": f"{ratio} tokens per active parameter"}
        for color, style, ratio in ratios
    ]
    return [Line2D([], [], **{"linestyle": "", **look}) for look in (*points, *lines)]


def _source(rows: Sequence[SizePlan]) -> str:
    outside = ", ".join(row.name for row in rows if row.loss and row.loss.extrapolated)
    missing = ", ".join(row.name for row in rows if not row.loss)
    lines = [f"Loss: {LOSS_SOURCE}."]
    lines += [f"Not drawn, because its vocabulary is too small for the laws: {missing}."] if missing else []
    lines += [f"Outside the fitted range of the law: {outside}."] if outside else []
    return "\n".join(lines)


def _keep_apart(figure: Figure, names: Sequence[Annotation]) -> None:
    """Moves every label down that overlaps one to its left."""
    figure.draw_without_rendering()
    for index, name in enumerate(names):
        while any(name.get_window_extent().overlaps(other.get_window_extent()) for other in names[:index]):
            x, y = name.get_position()
            name.set_position((x, y - 2))

"""The plot of a plan: points, error bars, curves and labels."""

from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from deepseek_v3.config.loading import list_config_files, load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.advisor import Advice, advise
from deepseek_v3.planning.advice.plot import plot_plan
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.hardware import find_device
from deepseek_v3.planning.scaling_laws import expected_loss
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT

SIZES = "1b 5b 10b 15b 20b base".split()


@cache
def _configs() -> dict[Path, RunConfig]:
    return {path: load_config(path) for path in list_config_files(ROOT / "configs")}


@cache
def _advice(**limits: Any) -> Advice:
    device = find_device("H100")
    assert device
    return advise(PlanRequest(device, 8, **limits), _configs())


@cache
def _axes(**limits: Any) -> Axes:
    """The axes of the plot of a plan, which is drawn once and not written as a picture."""
    with patch.object(Figure, "savefig", autospec=True) as save, TemporaryDirectory() as folder:
        save.side_effect = lambda _, path, **__: Path(path).touch()
        plot_plan(_advice(**limits), Path(folder) / "plan.png")
    figure = save.call_args.args[0]
    figure.draw_without_rendering()
    return figure.axes[0]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.png"
    plot_plan(_advice(), path)
    height, width, _ = imread(path).shape
    assert (width, height) == (1500, 937)
    assert list(path.parent.iterdir()) == [path]


def test_every_size_with_a_loss_is_drawn_with_its_bar() -> None:
    advice, axes = _advice(budget_hours=72.0), _axes(budget_hours=72.0)
    rows = [row for row in advice.rows if row.loss]
    assert [row.name for row in rows] == SIZES
    assert len(axes.containers) == len(rows)
    for row, container in zip(rows, axes.containers, strict=True):
        point, _, (bar,) = container  # type: ignore[misc]
        assert row.loss
        assert list(point.get_xdata()) == [row.compute]
        assert list(point.get_ydata()) == [row.loss.value]
        assert point.get_marker() == ("*" if row is advice.recommended else "o")
        assert (point.get_markerfacecolor() == "white") == (not row.fits)
        ends = bar.get_segments()[0][:, 1]
        assert list(ends) == pytest.approx([row.loss.low, row.loss.high])


@pytest.mark.parametrize("limits", [{}, {"budget_hours": 72.0}, {"budget_dollars": 200.0}])
def test_all_labels_are_drawn_and_do_not_overlap(limits: dict[str, Any]) -> None:
    axes = _axes(**limits)
    named = [text for text in axes.texts if text.get_text() in SIZES]
    assert [text.get_text() for text in named] == SIZES
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    figure = axes.get_figure().get_window_extent()  # type: ignore[union-attr]
    assert all(figure.x0 <= box.x0 and box.x1 <= figure.x1 for box in boxes)


def test_the_curves_follow_the_law() -> None:
    advice, axes = _advice(), _axes()
    rows = [row for row in advice.rows if row.loss]
    curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 60]
    assert len(curves) == len(rows)
    for row, curve in zip(rows, curves, strict=True):
        for compute, loss in ((xs[index], ys[index]) for xs, ys in [curve.get_data()] for index in (0, 30, 59)):
            tokens = compute / (6 * row.active_parameters)
            assert loss == pytest.approx(expected_loss(row.config.model, tokens).value)
        first, last = curve.get_xdata()[0], curve.get_xdata()[-1]
        assert first / (6 * row.active_parameters**2) == pytest.approx(5)
        assert last / (6 * row.active_parameters**2) == pytest.approx(100)
    for ratio, style in ((20, "-"), (26, "--")):
        [law] = [
            line
            for line in axes.get_lines()
            if len(line.get_xdata()) == len(rows) and line.get_linestyle() == style
        ]
        assert list(law.get_xdata()) == pytest.approx([6 * ratio * row.active_parameters**2 for row in rows])


def test_the_budget_is_a_line_at_its_operations() -> None:
    advice, axes = _advice(budget_hours=72.0), _axes(budget_hours=72.0)
    row = advice.recommended
    assert row
    assert row.cost
    [line] = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert line.get_xdata()[0] == pytest.approx(row.compute * 72 / row.cost.hours)
    low, high = axes.get_xlim()
    assert low < line.get_xdata()[0] < high
    [note] = [text.get_text() for text in axes.texts if text.get_text() not in SIZES]
    assert note.startswith("72 hours:\n")
    assert note.endswith(f"at the speed of {row.name}")


def test_both_limits_are_named_and_the_tighter_one_drawn() -> None:
    axes = _axes(budget_hours=1e-5, budget_dollars=1e6)
    assert any(text.get_text().startswith("1e-05 hours and $1,000,000:") for text in axes.texts)
    [line] = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    low, high = axes.get_xlim()
    assert low < line.get_xdata()[0] < high


def test_without_a_budget_there_is_no_line() -> None:
    axes = _axes(tokens=10**11)
    assert all(line.get_linestyle() != ":" for line in axes.get_lines())
    assert [text.get_text() for text in axes.texts] == SIZES


def test_axes_legend_and_source_say_what_is_shown() -> None:
    axes = _axes()
    assert axes.get_title(loc="left") == "What 8 × H100 can train"
    assert axes.get_xlabel() == "training compute (FLOPs: 6 × active parameters × tokens)"
    assert axes.get_ylabel() == "expected loss (nats per token)"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "recommended",
        "fits",
        "does not fit",
        "20 tokens per active parameter",
        "26 tokens per active parameter",
        "5 to 100 tokens per active parameter",
    ]
    source = axes.get_figure().get_supxlabel()  # type: ignore[union-attr]
    assert "arXiv:2502.05172" in source
    assert source.endswith("\nOutside the fitted range of the law: 10b, 15b, 20b, base.")
    assert "\nNot drawn, because its vocabulary is too small for the laws: tiny.\n" in source


def test_sizes_without_a_loss_are_not_drawn(tmp_path: Path) -> None:
    device = find_device("CPU")
    assert device
    path = ROOT / "configs" / "deepseek_v3_tiny.yaml"
    advice = advise(PlanRequest(device, 1), {path: load_config(path)})
    with pytest.raises(ConfigError, match="no size here has an expected loss"):
        plot_plan(advice, tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []

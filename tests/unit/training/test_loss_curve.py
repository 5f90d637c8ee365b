from __future__ import annotations

import logging
import math
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from deepseek_v3.training.loss_curve import plot_losses
from deepseek_v3.training.metrics import plot_run

RECORDS = [{"step": step, "tokens": 2048 * step, "loss": 2 + 8 / step} for step in range(1, 200)]


def test_the_picture_is_a_png_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "report" / "loss.png"
    plot_losses(RECORDS, path)
    height, width, _ = imread(path).shape
    assert (width, height) == (1350, 750)
    assert list(path.parent.iterdir()) == [path]


def test_every_curve_and_baseline_is_named(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [*RECORDS, {"step": 100, "tokens": 204_800, "holdout_loss": 2.2}]
    records += [{"step": 1, "tokens": 2048, "mtp_loss": 5.0}]
    plot_losses(records, tmp_path / "loss.png", {"unigram": 7.0, "bigram": 5.0})
    axes = drawn[0].axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "training, multi-token", "held-out"]
    assert [text.get_text() for text in axes.texts] == ["bigram 5.00", "unigram 7.00"]
    assert axes.get_xlabel() == "tokens (thousands)"
    assert axes.get_ylabel() == "loss (nats per token)"


def test_every_source_of_a_mixture_has_a_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    losses = {"holdout_loss": 2.2, "holdout_loss/web": 2.5, "holdout_loss/code": 1.5}
    plot_losses([*RECORDS, {"step": 100, "tokens": 204_800, **losses}], tmp_path / "loss.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert list(lines["held-out web"].get_ydata()) == [2.5]
    assert list(lines["held-out code"].get_ydata()) == [1.5]


def test_curves_of_sources_have_colours_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    losses = {f"holdout_loss/source{number}": 2.0 + number for number in range(6)}
    plot_losses([*RECORDS, {"step": 100, "tokens": 204_800, "holdout_loss": 2.2, **losses}], tmp_path / "loss.png")
    lines = [line for line in drawn[0].axes[0].get_lines() if not str(line.get_label()).startswith("_")]
    colours = [np.array(to_rgb(line.get_color())) for line in lines]
    assert len(colours) == 8
    assert min(np.abs(one - other).max() for one, other in combinations(colours, 2)) > 0.12


def test_names_in_the_margin_do_not_touch(tmp_path: Path, drawn: list[Figure]) -> None:
    baselines = {"bigram": 5.01, "trigram": 5.0, "fourgram": 4.99, "unigram": 5.3}
    plot_losses(RECORDS, tmp_path / "loss.png", baselines)
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert len(boxes) == 4
    assert all(lower.y1 < upper.y0 for lower, upper in pairwise(boxes))


def test_missing_and_non_finite_values_are_skipped(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [
        {"step": 1, "tokens": 10, "loss": 3.0},
        {"step": 2, "tokens": 20, "loss": None, "holdout_loss": math.nan},
        {"step": 3, "tokens": 30, "loss": math.inf},
        {"step": 4, "loss": 2.5},
        {"step": 5, "tokens": 50},
        {"step": 6, "tokens": 60, "loss": 2.0},
    ]
    plot_losses(records, tmp_path / "loss.png")
    raw, smoothed = drawn[0].axes[0].get_lines()
    assert list(raw.get_xdata()) == list(smoothed.get_xdata()) == [10, 60]
    assert list(raw.get_ydata()) == [3.0, 2.0]


def test_smoothing_keeps_the_level_of_a_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    noisy = [{"step": step, "tokens": step, "loss": 3.0 + (-1) ** step * 0.5} for step in range(1, 1001)]
    plot_losses(noisy, tmp_path / "loss.png")
    _, smoothed = drawn[0].axes[0].get_lines()
    values = list(smoothed.get_ydata())
    assert len(values) == 1000
    assert all(abs(value - 3.0) < 0.05 for value in values[25:])


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "tokens": 5, "loss": math.nan}]])
def test_nothing_to_plot_is_an_error(records: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"none of the {len(records)} records holds tokens and a finite loss"):
        plot_losses(records, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_programs_that_plot_keep_their_own_matplotlib_state() -> None:
    plots = "deepseek_v3.training.loss_curve, deepseek_v3.planning.advice.plot"
    code = f"import sys, {plots}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = '{"step": 1, "tokens": 128, "loss": 5.5}\n'


@pytest.mark.parametrize(
    ("metrics", "drawn", "told"),
    [
        (GOOD, True, ""),
        (GOOD + '{"step": 2, "tok', True, ""),
        ("", False, "loss.png: not drawn: "),
        ('{"step": 1, "tokens": 128, "loss": null}\n', False, "metrics.jsonl holds no loss"),
        ("\0\0\0", False, "metrics.jsonl holds no loss"),
        ("{broken\n" + GOOD, False, "loss.png: cannot be drawn: "),
        (None, False, "metrics.jsonl: cannot be read: No such file"),
    ],
)
@pytest.mark.usefixtures("loss_picture")
def test_a_run_ends_well_whatever_its_metrics_hold(
    metrics: str | None, drawn: bool, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    plot_run(tmp_path)
    assert (tmp_path / "loss.png").exists() == drawn
    assert told in caplog.text
    assert len(caplog.messages) == (0 if drawn else 1)

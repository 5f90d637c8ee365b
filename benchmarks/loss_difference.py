"""Compares the losses of pairs of runs that differ in their precision alone: statistics, a table, curves.

A result is a dict of `train` and `held_out`, lists of [step, loss], and of the final `held_out_batches`, the
held-out loss of every batch, with their mean `final_held_out`; `final_held_out_in_the_other` is that of the same
weights in the other precision. Results are given by (precision, seed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

LIMIT = 0.0025  # of the baseline's held-out loss
COLORS = ("#1f5fa8", "#d1495b")

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of independent values, by Student's t distribution. Needs two values."""
    half = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def relative_differences(results: Results, baseline: str, candidate: str) -> dict[int, list[float]]:
    """For each step with a held-out loss, candidate / baseline - 1 of every seed."""
    found: dict[int, list[float]] = {}
    for seed in seeds_of(results):
        before, after = results[baseline, seed]["held_out"], results[candidate, seed]["held_out"]
        for (step, expected), (_, loss) in zip(before, after, strict=True):
            found.setdefault(step, []).append(loss / expected - 1)
    return found


def compare(results: Results, baseline: str, candidate: str) -> dict[str, Any]:
    """The figures of the comparison at the end of training; differences are shares of the baseline's loss."""
    seeds = seeds_of(results)
    losses = {name: [results[name, seed]["final_held_out"] for seed in seeds] for name in (baseline, candidate)}
    differences = [after / before - 1 for before, after in zip(losses[baseline], losses[candidate], strict=True)]
    low, high = interval(differences)
    mean = fmean(losses[baseline])
    crossed = {name: [results[name, seed]["final_held_out_in_the_other"] for seed in seeds] for name in losses}
    in_candidate = [a / b - 1 for b, a in zip(losses[baseline], crossed[baseline], strict=True)]
    in_baseline = [a / b - 1 for b, a in zip(losses[baseline], crossed[candidate], strict=True)]
    return {
        "baseline": baseline,
        "candidate": candidate,
        "seeds": seeds,
        "held_out_losses": losses,
        "relative_difference": fmean(differences),
        "relative_difference_95": [low, high],
        "relative_difference_by_seed": differences,
        # The baseline's weights run as the candidate; the candidate's weights run as the baseline.
        "relative_difference_of_running_alone": in_candidate,
        "relative_difference_of_training_alone": in_baseline,
        "relative_difference_of_batches_95": [_over_batches(results, baseline, candidate, seed) for seed in seeds],
        "baseline_seeds_stdev": stdev(losses[baseline]) / mean,
        "baseline_seeds_range": (max(losses[baseline]) - min(losses[baseline])) / mean,
        "limit": LIMIT,
        "difference_is_below_limit": abs(fmean(differences)) < LIMIT,
        "interval_is_below_limit": max(-low, high) < LIMIT,
        "tokens_per_second_median": {
            name: [results[name, seed]["tokens_per_second_median"] for seed in seeds] for name in losses
        },
        "seconds": {name: [results[name, seed]["seconds"] for seed in seeds] for name in losses},
    }


def _over_batches(results: Results, baseline: str, candidate: str, seed: int) -> list[float]:
    """The interval of one pair of models on other held-out text, from the paired differences of batches."""
    before, after = (results[name, seed]["held_out_batches"] for name in (baseline, candidate))
    mean = fmean(before)
    return [each / mean for each in interval([b - a for a, b in zip(before, after, strict=True)])]


def table(results: Results) -> str:
    """CSV with a row for each step that has a loss: step, seed, precision, train loss, held-out loss."""
    lines = ["step,seed,precision,train_loss,held_out_loss"]
    for (name, seed), result in results.items():
        train, held_out = dict(result["train"]), dict(result["held_out"])
        for step in sorted(train | held_out):
            lines.append(f"{step},{seed},{name},{train.get(step, '')},{held_out.get(step, '')}")
    return "\n".join(lines) + "\n"


def draw(results: Results, baseline: str, candidate: str, path: Path) -> None:
    """Draws all curves on top of each other, and the relative difference of the held-out losses, as a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    curves, differences = figure.subplots(1, 2)
    seeds = seeds_of(results)
    for name, color, style in zip((baseline, candidate), COLORS, ("-", "--"), strict=True):
        for seed in seeds:
            result, label = results[name, seed], f"{name}, {{}}" if seed == seeds[0] else None
            training, held_out = (label and label.format(what) for what in ("training", "held-out"))
            curves.plot(*zip(*result["train"], strict=True), style, color=color, alpha=0.35, lw=0.8, label=training)
            curves.plot(*zip(*result["held_out"], strict=True), "o" + style, color=color, ms=3.5, label=held_out)
    curves.set(
        xlabel="step", ylabel="loss (nats per token)", title=f"{candidate} and {baseline}, {len(seeds)} seeds"
    )
    curves.legend(frameon=False)

    by_step = relative_differences(results, baseline, candidate)
    steps = list(by_step)
    percent = {step: [100 * each for each in values] for step, values in by_step.items()}
    for index, seed in enumerate(seeds):
        differences.plot(steps, [percent[step][index] for step in steps], ".-", lw=0.8, label=f"seed {seed}")
    bounds = [interval(percent[step]) for step in steps]
    low, high = zip(*bounds, strict=True)
    differences.fill_between(steps, low, high, color=COLORS[0], alpha=0.15, label="95% interval of the mean")
    differences.plot(steps, [fmean(percent[step]) for step in steps], color=COLORS[0], lw=2, label="mean")
    for sign in (-1, 1):
        differences.axhline(sign * 100 * LIMIT, color="#5f6770", ls="--", lw=1)
    spread = 100 * stdev(losses := [results[baseline, seed]["final_held_out"] for seed in seeds]) / fmean(losses)
    differences.axhspan(
        -spread, spread, color="#5f6770", alpha=0.12, lw=0, label=f"± the seeds' deviation in {baseline}"
    )
    differences.set(xlabel="step", ylabel=f"held-out loss of {candidate} over {baseline}, minus 1 (%)")
    differences.set_title(f"difference; dashed: ±{LIMIT:.2%}")
    differences.legend(frameon=False, fontsize=8)
    for axes in (curves, differences):
        axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def seeds_of(results: Results) -> list[int]:
    """The seeds, in their order."""
    return list(dict.fromkeys(seed for _, seed in results))

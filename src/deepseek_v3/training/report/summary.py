"""The main figures of runs, as texts: the table on the terminal, and the first table of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepseek_v3.training.report.run_files import Run
from deepseek_v3.utils.monitoring import time_left
from deepseek_v3.utils.text import format_count, format_percent, format_si, three_figures

_NONE = "–"


def summary(run: Run) -> dict[str, str]:
    """The main figures of a run by name; those that it did not log are `–`."""
    worst = [max(values) for values in run.layers("experts/max_violation")[-1:] if values]
    used = [min(values) for values in run.layers("experts/utilisation")[-1:] if values]
    return {
        "step": _steps(run),
        "tokens": format_count(int(run.tokens)) if math.isfinite(run.tokens) else _NONE,
        "of plan": _NONE if run.budget is None else format_percent(run.tokens, run.budget),
        "loss": _figure(run.values("loss")[-1:], ".4f"),
        "held-out loss": _figure([record["holdout_loss"] for record in run.validations[-1:]], ".4f"),
        "of the average": _figure([record.get("ema_holdout_loss") for record in run.validations[-1:]], ".4f"),
        "learning rate": _figure(run.values("learning_rate")[-1:], ".2e"),
        "gradient norm": _figure(run.values("gradient_norm")[-1:], ".3g"),
        "tokens/s": f"{run.tokens_per_second:,.0f}" if math.isfinite(run.tokens_per_second) else _NONE,
        "MFU": _figure([100 * value for value in run.values("mfu")[-1:]], ".1f", "%"),
        "memory": _figure([value / 2**30 for value in run.values("memory_bytes")[-1:]], ".1f", " GiB"),
        "worst MaxVio": _figure(worst, ".2f"),
        "experts used": _figure([100 * value for value in used], ".1f", "%"),
        "skipped": f"{int(run.last.get('skipped_steps') or 0):,}",
        "anomalies": ", ".join(f"{number} {kind}" for kind, number in sorted(run.anomalies.items())) or "0",
        "alarms": ", ".join(f"{number} {kind}" for kind, number in sorted(run.alarms.items())) or "0",
        "rollbacks": str(run.count("rollback")),
        "restarts": str(run.restarts),
        "end": _end(run),
    }


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table with one column for each run; figures that no run has are left out."""
    columns = [summary(run) for run in runs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return ["", *(run.name for run in runs)], [row for row in rows if set(row[1:]) != {_NONE}]


def tokens_of(number: float) -> str:
    """A number of tokens on an axis."""
    return format_si(number, "").replace(".0", "")


def hours_of(number: float) -> str:
    """A number of hours on an axis."""
    return f"{three_figures(number)} h"


def _steps(run: Run) -> str:
    return f"{run.last['step']:,}"


def _figure(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """The last of the values; `–` if there is none, or it is not finite."""
    if not values or values[-1] is None or not math.isfinite(values[-1]):
        return _NONE
    return f"{values[-1]:{form}}{unit}"


def _end(run: Run) -> str:
    """When the run ended, or will."""
    if run.updated is not None and run.is_finished:
        return f"finished {run.updated:%Y-%m-%d %H:%M} UTC"
    if run.expected_end is None or run.updated is None:
        return _NONE
    left = time_left(int((run.expected_end - run.updated).total_seconds()), 1)
    ended = run.events and run.events[-1]["event"] in ("end", "failure")
    state = f"stopped, {left} to go" if ended else f"in {left}"
    return state if ended else f"{state}, {run.expected_end:%Y-%m-%d %H:%M} UTC"

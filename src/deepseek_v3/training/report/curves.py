"""The line charts of a report: progress, losses, optimizer and speed, with a line for each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from deepseek_v3.charts.lines import LineStyle, Marker, Series, line_chart
from deepseek_v3.charts.markup import Html, concat, element, slug
from deepseek_v3.training.report.run_files import Run
from deepseek_v3.training.report.summary import hours_of, tokens_of
from deepseek_v3.utils.text import humanize, truncate

_NATS = LineStyle("{:.3f}".format, cuts_top=True)
_PLAIN = LineStyle("{:,.3g}".format)
_EVENT_CHARACTERS = 200


def progress_section(runs: Sequence[Run]) -> Html:
    """Tokens over wall-clock time, with the expected rest of each run as a dashed line."""
    series: list[Series] = []
    for colour, run in enumerate(runs):
        times = run.values("time")
        start = next((time for time in times if math.isfinite(time)), math.nan)
        hours = [(time - start) / 3600 for time in times]
        tokens = run.values("tokens")
        series.append(Series(run.name, hours, tokens, colour))
        if run.expected_end is not None and run.budget is not None and not run.is_finished:
            end = (run.expected_end.timestamp() - start) / 3600
            rest = Series(f"{run.name}, expected", [hours[-1], end], [tokens[-1], run.budget], colour, dashed=True)
            series.append(rest)
    style = LineStyle(tokens_of, from_zero=True)
    caption = "Tokens over hours since the first report. Dashed: the rest of the plan at the present speed."
    chart = line_chart("tokens", "Tokens trained on", caption, series, style, hours_of)
    return _charts([chart])


def loss_section(runs: Sequence[Run]) -> Html:
    """Training and held-out loss, and the parts of the total loss that the runs have."""
    held_out = [*_validations(runs, "holdout_loss"), *_validations(runs, "ema_holdout_loss", "EMA")]
    both = [*_series(runs, "loss"), *held_out]
    main = "Main loss in nats per token; dots: held-out. The top of the axis leaves out the steep start."
    charts = [_chart(runs, "loss", "Loss", main, both, _NATS)]
    captions = {
        "mtp_loss": ("Multi-token prediction", "Mean loss over prediction depths, nats per token."),
        "balance_loss": (
            "Sequence balance",
            "Sum over layers, before its weight α; the number of MoE layers is even.",
        ),
    }
    for name, (title, caption) in captions.items():
        charts.append(_chart(runs, name, title, caption, _series(runs, name), _NATS))
    for name in _names(runs, "loss_terms/"):
        charts.append(
            _chart(runs, name, f"Loss term {name[11:]}", "Before its weight.", _series(runs, name), _PLAIN)
        )
    for name in _names(runs, "holdout_loss/"):
        source = name.removeprefix("holdout_loss/")
        lines = _validations(runs, name)
        charts.append(_chart(runs, name, f"Held-out loss: {source}", "Nats per token.", lines, _NATS))
    bits = _validations(runs, "holdout_bits_per_byte")
    caption = "Comparable between tokenizers."
    charts.append(_chart(runs, "bits", "Held-out bits per byte", caption, bits, _NATS))
    return _charts(charts)


def optimizer_section(runs: Sequence[Run]) -> Html:
    """Learning rate, gradient norm and skipped steps."""
    rate = LineStyle(lambda value: f"{value:.1e}" if value else "0", from_zero=True)
    norm = LineStyle("{:.3g}".format, is_log=True)
    count = LineStyle("{:,.0f}".format, from_zero=True)
    clipping = "Norm of the whole gradient before clipping, on a logarithmic axis."
    return _charts(
        [
            _chart(runs, "learning_rate", "Learning rate", "As scheduled.", _series(runs, "learning_rate"), rate),
            _chart(runs, "gradient_norm", "Gradient norm", clipping, _series(runs, "gradient_norm"), norm),
            _chart(runs, "skipped_steps", "Skipped steps", "So far.", _series(runs, "skipped_steps"), count),
        ]
    )


def speed_section(runs: Sequence[Run]) -> Html:
    """Throughput, model FLOPs utilisation and memory."""
    fast, percent = LineStyle(tokens_of, from_zero=True), LineStyle("{:.0%}".format, from_zero=True)
    memory = LineStyle("{:g} GiB".format, from_zero=True)
    in_bytes = _series(runs, "memory_bytes")
    sizes = [Series(each.name, each.x, [y / 2**30 for y in each.y], each.colour) for each in in_bytes]
    rate = "Tokens of all ranks, between two reports."
    utilisation = "Model FLOPs utilisation: share of the devices' peak in bfloat16."
    peak = "Of rank 0 since the start: tensors on a GPU, the process on a CPU."
    return _charts(
        [
            _chart(runs, "tokens_per_second", "Tokens per second", rate, _series(runs, "tokens_per_second"), fast),
            _chart(runs, "mfu", "MFU", utilisation, _series(runs, "mfu"), percent),
            _chart(runs, "memory", "Peak memory", peak, sizes, memory),
        ]
    )


def markers_of(run: Run) -> list[Marker]:
    """Anomalies, alarms, rollbacks, restarts and failures of a run, at the tokens of their steps."""
    found: dict[tuple[int, str], Marker] = {}
    for event in run.events:
        kind, step = event["event"], event["step"]
        if kind == "end" or (kind == "start" and step == 0):
            continue
        name = "restart" if kind == "start" else kind
        text = truncate(f"{run.name}: {name} at step {step:,} {event_text(event)}".rstrip(), _EVENT_CHARACTERS)
        found[step, kind] = Marker(run.tokens_at(step), text, "event" if kind == "start" else "alarm")
    return [marker for marker in found.values() if math.isfinite(marker.x)]


def event_text(event: dict[str, object]) -> str:
    """What an event says beside its name, step and time."""
    fields = ("kind", "meaning", "advice", "loss", "norm", "to_step", "error", "host", "device", "ranks")
    return ", ".join(f"{humanize(name)} {event[name]}" for name in fields if event.get(name) is not None)


def _chart(
    runs: Sequence[Run], key: str, title: str, caption: str, series: Sequence[Series], style: LineStyle
) -> Html | None:
    markers = [marker for run in runs for marker in markers_of(run)]
    return line_chart(slug(key), title, caption, series, style, tokens_of, markers)


def _charts(charts: Iterable[Html | None]) -> Html:
    shown = [chart for chart in charts if chart is not None]
    return element("div", *shown, class_="charts") if shown else concat([element("p", "Nothing was logged.")])


def _series(runs: Sequence[Run], name: str) -> list[Series]:
    return [Series(run.name, run.values("tokens"), run.values(name), number) for number, run in enumerate(runs)]


def _validations(runs: Sequence[Run], name: str, what: str = "held-out") -> list[Series]:
    def column(run: Run, field: str) -> list[float]:
        found = (record.get(field) for record in run.validations)
        return [float(value) if isinstance(value, (int, float)) else math.nan for value in found]

    return [
        Series(f"{run.name}, {what}", column(run, "tokens"), column(run, name), number, dotted=True)
        for number, run in enumerate(runs)
    ]


def _names(runs: Sequence[Run], prefix: str) -> list[str]:
    """The names of the metrics with this prefix, in the order in which the runs log them."""
    records = (record for run in runs for record in (*run.steps, *run.validations))
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))


Section = Callable[[Sequence[Run]], Html]

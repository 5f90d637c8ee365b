"""The page of one or several runs: one HTML file that loads nothing else and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek_v3.charts.lines import legend_of
from deepseek_v3.charts.markup import Html, TableBody, concat, element, html_page, html_table
from deepseek_v3.config.loading import config_to_yaml
from deepseek_v3.training.report.curves import (
    Section,
    event_text,
    loss_section,
    optimizer_section,
    progress_section,
    speed_section,
)
from deepseek_v3.training.report.expert_charts import experts_section
from deepseek_v3.training.report.run_files import Record, Run
from deepseek_v3.training.report.summary import comparison
from deepseek_v3.training.resume_rules import Rule, changes_of
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import pluralize, truncate

_EVENT_CHARACTERS = 500
_MOST_EVENTS = 100  # of a run
_MARKERS = (
    "Red lines: anomalies, alarms, rollbacks and failures; dotted grey lines: restarts. Point at a chart for its "
    "values."
)
_STYLE = """\
pre { background: var(--panel); border-radius: 4px; padding: 0.75rem 1rem; overflow-x: auto; }
.run dd { font-size: 1.125rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll + .legend { margin-top: 1rem; }
"""


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of at least one run to `path`. The same files give the same bytes. Raises OSError."""
    with atomic_write(path) as partial:
        partial.write_bytes(page(runs).encode())


def page(runs: Sequence[Run]) -> str:
    """The whole page. Charts leave out what no run has logged."""
    sections: dict[str, Section] = {
        "Progress": progress_section,
        "Loss": loss_section,
        "Optimizer": optimizer_section,
        "Speed": speed_section,
        "Experts": experts_section,
        "Events": _events_section,
        "Environment": _environment_section,
        "Config": _config_section,
    }
    title = f"Training: {runs[0].name}" if len(runs) == 1 else f"Training: {pluralize(len(runs), 'run')}"
    return html_page(title, _header(runs), {name: show(runs) for name, show in sections.items()}, _STYLE)


def _header(runs: Sequence[Run]) -> Html:
    """Warnings, then the main figures: of one run as cards, of several as a table with the legend of all charts."""
    header, rows = comparison(runs)
    if len(runs) == 1:
        cards = [element("div", element("dt", name), element("dd", value), class_="card") for name, value in rows]
        figures = element("dl", *cards, class_="cards run")
    else:
        table = html_table("After the last report", header, TableBody(rows))
        figures = concat([table, legend_of([run.name for run in runs])])
    return concat([_alarms(runs), figures, element("p", _MARKERS, class_="note")])


def _alarms(runs: Sequence[Run]) -> Html:
    """What somebody should look at: anomalies, alarms, rollbacks and failures."""
    items = []
    for run in runs:
        found = [f"{number} {kind}" for kind, number in sorted((run.anomalies + run.alarms).items())]
        found += [pluralize(run.count("rollback"), "rollback")] if run.count("rollback") else []
        if run.events and run.events[-1]["event"] == "failure":
            found.append(f"it failed after step {run.events[-1]['step']:,}")
        if found:
            link = element("a", "events", href="#events")
            items.append(element("li", element("bdi", run.name), f": {', '.join(found)}. See the ", link, "."))
    if not items:
        return concat([])
    heading = element("h2", "Anomalies and alarms", id="alarms")
    return element("section", heading, element("ul", *items), class_="alarms", aria_labelledby="alarms")


def _events_section(runs: Sequence[Run]) -> Html:
    bodies = [
        TableBody([_event_row(event) for event in run.events[-_MOST_EVENTS:]], run.name if len(runs) > 1 else None)
        for run in runs
        if run.events
    ]
    if not bodies:
        return element("p", "No events were logged.")
    table = html_table(
        "The last events, in the order in which they happened", ["event", "step", "time", ""], *bodies, left=[3]
    )
    note = "events.jsonl in the run's folder has the samples of each anomaly."
    return concat([table, element("p", note, class_="note")])


def _event_row(event: Record) -> list[str]:
    name = "restart" if event["event"] == "start" and event["step"] else event["event"]
    text = truncate(event_text(event), _EVENT_CHARACTERS)
    return [name, f"{event['step']:,}", str(event.get("time", "–")), text]


def _environment_section(runs: Sequence[Run]) -> Html:
    """Where each run was started last."""
    columns = []
    for run in runs:
        start = next((event for event in reversed(run.events) if event["event"] == "start"), {})
        versions = start.get("versions")
        plain = {name: str(start[name]) for name in ("host", "device", "ranks") if name in start}
        columns.append(plain | ({k: str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}))
    names = dict.fromkeys(name for column in columns for name in column)
    if not names:
        return element("p", "No start was logged.")
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return html_table("At the last start", ["", *(run.name for run in runs)], TableBody(rows))


def _config_section(runs: Sequence[Run]) -> Html:
    """What differs from the first run, and each config as a whole."""
    first, parts = runs[0], []
    for run in runs[1:]:
        if first.config is not None and run.config is not None:
            different = changes_of(first.config, run.config, *Rule)
            text = f" differs from {first.name}: {different}" if different else f" is that of {first.name}"
            parts.append(element("p", element("bdi", run.name), redact(text)))
    for run in runs:
        text = "config.yaml cannot be read." if run.config is None else redact(config_to_yaml(run.config))
        parts.append(element("details", element("summary", run.name), element("pre", text)))
    return concat(parts)

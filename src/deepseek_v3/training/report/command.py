"""`dsv3 report` and `dsv3 watch`: the figures of runs as a table, as one page with charts, or while they train."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepseek_v3.training.report.curves import event_text
from deepseek_v3.training.report.run_files import Run, open_runs
from deepseek_v3.training.report.run_page import write_report
from deepseek_v3.training.report.summary import comparison
from deepseek_v3.utils.command_line import number_option, print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import output_file_problem
from deepseek_v3.utils.logging import configure_logging, get_console
from deepseek_v3.utils.text import printable, table, truncate

_RUNS = typer.Argument(metavar="RUN...", help="Folders of runs (logging.directory).")
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS, _EVENT_CHARACTERS = 40, 60  # of a curve, and of the last event


def report(
    runs: Annotated[list[Path], _RUNS],
    html: Annotated[bool, typer.Option("--html", help="Write one HTML page with charts.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; report.html in the first folder.")
    ] = None,
) -> None:
    """Show the metrics of runs beside each other: a table, or one page with charts."""
    configure_logging()
    if output is not None and not html:
        raise ConfigError(f"--output {output}: expected with --html, which writes the page")
    found = open_runs(runs)
    header, rows = comparison(found)
    typer.echo(printable("\n".join([*table(header, rows), ""])))
    if not html:
        print_next_steps(["dsv3", "report", *runs, "--html"])
        return
    path = output or found[0].folder / "report.html"
    if problem := output_file_problem(path):
        raise ConfigError(f"--output {path}: {problem}")
    write_report(found, path)
    typer.echo(f"{path}: open it in a browser")
    print_next_steps(*map(_next_step, found))


def watch(
    runs: Annotated[list[Path], _RUNS],
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", parser=number_option, help="Time between two readings.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
) -> None:
    """Follow runs in the terminal while they train; Ctrl-C ends it and not the runs."""
    configure_logging()
    if not interval > 0:
        raise ConfigError(f"--interval {interval:g}: expected more than 0 seconds")
    found = open_runs(runs)
    if once:
        get_console().print(view(found))
    else:
        _follow(runs, found, interval)
    print_next_steps(["dsv3", "report", *runs, "--html"])


def _next_step(run: Run) -> list[object]:
    """Follow a run that still trains; evaluate one that has used up its budget."""
    if run.config is None or not run.is_finished:
        return ["dsv3", "watch", run.folder]
    return ["dsv3", "eval", "--checkpoint", run.config.checkpoint.directory]


def view(runs: Sequence[Run]) -> Table:
    """The main figures, the curve of the loss and the last event, with one column for each run."""
    header, rows = comparison(runs)
    figures = Table(box=None, padding=(0, 2, 0, 0))
    for name in header:
        figures.add_column(Text(name), justify="left" if not name else "right")
    for row in rows:
        figures.add_row(*map(Text, row))
    figures.add_row("loss over time", *(Text(curve(run.values("loss"))) for run in runs))
    figures.add_row("last event", *(Text(_last_event(run)) for run in runs))
    return figures


def curve(values: Sequence[float]) -> str:
    """The finite values as one line of bars, the last 40 columns wide: each the mean of equally many values."""
    kept = [value for value in values if math.isfinite(value)]
    size = -(-len(kept) // _COLUMNS) or 1
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    means = [sum(group) / len(group) for group in groups]
    if not means:
        return "–"
    low, extent = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - low) / (extent or 1.0) * (len(_BARS) - 1))] for mean in means)


def _follow(paths: Sequence[Path], found: list[Run], interval: float) -> None:
    """Redraws the view until all runs have ended, or until Ctrl-C."""
    try:
        with Live(view(found), console=get_console(), auto_refresh=False) as live:
            while not all(run.is_finished for run in found):
                time.sleep(interval)
                found = open_runs(paths)
                live.update(view(found), refresh=True)
    except KeyboardInterrupt:
        return


def _last_event(run: Run) -> str:
    if not run.events:
        return "–"
    event = run.events[-1]
    return truncate(f"{event['event']} at step {event['step']:,} {event_text(event)}".rstrip(), _EVENT_CHARACTERS)

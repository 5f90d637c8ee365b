"""`dsv3 report`: the metrics of runs as a table, or as one page with charts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.training.report.run_files import open_runs
from deepseek_v3.training.report.run_page import write_report
from deepseek_v3.training.report.summary import comparison
from deepseek_v3.utils.command_line import print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import output_file_problem
from deepseek_v3.utils.logging import configure_logging
from deepseek_v3.utils.text import printable, table


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs (logging.directory).")],
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

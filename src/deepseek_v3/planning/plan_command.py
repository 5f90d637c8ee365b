"""`dsv3 plan`, also `python scripts/select_config.py`: what some devices can train within a budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.loading import load_config, select_config_files
from deepseek_v3.planning.advice.advisor import Advice, advise
from deepseek_v3.planning.advice.output_json import advice_as_json
from deepseek_v3.planning.advice.output_text import print_advice, print_devices
from deepseek_v3.planning.advice.prompts import ask_for_options
from deepseek_v3.planning.advice.request import OBJECTIVES, PlanOptions, PlanRequest
from deepseek_v3.planning.hardware import known_devices
from deepseek_v3.utils.command_line import integer_option, number_option, print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.text import printable


def plan(
    gpus: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", parser=integer_option(), help="Number of devices.", show_default="8; 1 CPU"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Such as A100 or 'RTX 4090'; see --list-gpus.", show_default="H100"),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", parser=number_option, help="Instead of --gpu: the usual device with this memory."
        ),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of --gpu: a YAML file with the device's figures.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="DOLLARS", parser=number_option, help="Rent of one device for an hour.")
    ] = None,
    budget_hours: Annotated[
        float | None, typer.Option(metavar="HOURS", parser=number_option, help="Longest training time.")
    ] = None,
    budget_dollars: Annotated[
        float | None, typer.Option(metavar="DOLLARS", parser=number_option, help="Highest rent.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Tokens of the corpus, such as 3.8e9, 10B or 1.5T.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help=f"{', '.join(OBJECTIVES)}.", show_default=next(iter(OBJECTIVES)))
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Plan this run's YAML file, or a shipped size such as 1b; repeatable."),
    ] = None,
    configs: Annotated[Path | None, typer.Option(help="Folder of the sizes.", show_default="configs")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw loss against compute to FILE.png.")] = False,
    list_gpus: Annotated[bool, typer.Option("--list-gpus", help="Print the known devices and exit.")] = False,
    picture: Annotated[
        Path | None, typer.Argument(metavar="FILE.png", help="Where --plot draws.", show_default="plan.png")
    ] = None,
) -> None:
    """Say what a budget can train: fit, time, cost and expected loss of every size.

    Without any option, in a terminal, it asks.
    """
    if list_gpus:
        print_devices(known_devices())
        print_next_steps(["dsv3", "plan", "--gpu", gpu or "H100", "--gpus", gpus or 8])
        return
    picture = _picture(plot, picture)
    options = PlanOptions(gpus, gpu, gpu_memory, hardware, price, budget_hours, budget_dollars, tokens, objective)
    asks = (
        options == PlanOptions() and not (config or configs or override or as_json or picture) and _in_a_terminal()
    )
    if asks:
        options = ask_for_options()
    advice = _advise(options.request(), select_config_files(config, configs), override or [])
    if as_json:
        typer.echo(json.dumps(advice_as_json(advice), indent=2, allow_nan=False))
    else:
        print_advice(advice, price_given=options.price is not None)
    if picture:
        _plot(advice, picture)
    if asks:
        typer.echo(printable(f"\nThe same without questions: {options.command()}"))


def _advise(request: PlanRequest, paths: Sequence[Path], overrides: Sequence[str]) -> Advice:
    return advise(request, {path: load_config(path, overrides) for path in paths}, overrides)


def _picture(plot: bool, picture: Path | None) -> Path | None:
    """The file to draw to, if any is wanted."""
    if picture and not plot:
        raise ConfigError(f"{picture}: no argument is expected but a file for --plot; --plot {picture} draws to it")
    if picture and picture.suffix.lower() != ".png":
        raise ConfigError(f"--plot {picture}: expected a file name that ends in .png")
    return picture or (Path("plan.png") if plot else None)


def _in_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _plot(advice: Advice, path: Path) -> None:
    """Draws the plot. The plotting module is imported only here, because matplotlib loads slower than planning."""
    from deepseek_v3.planning.advice.plot import plot_plan

    try:
        plot_plan(advice, path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from None
    typer.echo(printable(f"Drawn: {path}"), err=True)

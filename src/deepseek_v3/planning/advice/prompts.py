"""The questions of `dsv3 plan` in a terminal, when it is run without options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import typer

from deepseek_v3.planning.advice.request import OBJECTIVES, PlanOptions
from deepseek_v3.planning.hardware import known_devices
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.numbers import parse_count, parse_number
from deepseek_v3.utils.text import printable


def ask_for_options() -> PlanOptions:
    """Asks for devices, limits and the objective. An empty answer keeps the default; a bad one is asked again."""
    names = [device.name for device in known_devices()]
    typer.echo("Which GPU?")
    typer.echo("\n".join(f"  {number:2}  {name}" for number, name in enumerate(names, 1)))
    objectives = "; ".join(f"{name}: {meaning}" for name, meaning in OBJECTIVES.items())
    options = PlanOptions()
    for question, changed in (
        ("Number, name, or its memory in GB [H100]", _device),
        ("How many [8; 1 CPU]", lambda given, answer: replace(given, gpus=_whole(answer))),
        ("Hours at most [no limit]", lambda given, answer: replace(given, budget_hours=_number(answer))),
        ("Dollars at most [no limit]", lambda given, answer: replace(given, budget_dollars=_number(answer))),
        ("Tokens of the corpus, such as 10B [no limit]", lambda given, answer: replace(given, tokens=answer)),
        (f"Objective ({objectives}) [best-loss]", lambda given, answer: replace(given, objective=answer)),
    ):
        options = _ask(question, options, changed)
    typer.echo()
    return options


def _ask(question: str, options: PlanOptions, changed: Callable[[PlanOptions, str], PlanOptions]) -> PlanOptions:
    """Asks one question until the answer gives a valid request; returns the options with the answer."""
    while True:
        answer = typer.prompt(printable(question), default="", show_default=False).strip()
        if not answer:
            return options
        try:
            answered = changed(options, answer)
            answered.request()
        except ConfigError as error:
            typer.echo(printable(f"  {error}"))
        else:
            return answered


def _device(options: PlanOptions, answer: str) -> PlanOptions:
    """Reads the device: a number in the list, gigabytes if the number is beyond the list, or a name."""
    devices = known_devices()
    try:
        number = parse_number(answer)
    except ValueError:
        return replace(options, gpu=answer)
    if number.is_integer() and 1 <= number <= len(devices):
        return replace(options, gpu=devices[int(number) - 1].name)
    return replace(options, gpu_memory=number)


def _whole(answer: str) -> int:
    try:
        return parse_count(answer)
    except ValueError as error:
        raise ConfigError(f"{answer}: {error}") from None


def _number(answer: str) -> float:
    try:
        return parse_number(answer.removeprefix("$"))
    except ValueError as error:
        raise ConfigError(f"{answer}: {error}") from None

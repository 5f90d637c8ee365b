"""`dsv3 validate`, also `python scripts/validate_chinchilla.py`: checks token budgets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.loading import PATTERN, load_config, select_config_files
from deepseek_v3.planning.chinchilla import Compliance, Verdict, check_compliance, format_ratio
from deepseek_v3.utils.command_line import override_options, print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.text import format_count, printable

_RULE = "=" * 80


def validate(
    config: Annotated[
        list[Path] | None, typer.Option(help="A run's YAML file, or a shipped size such as 1b; repeatable.")
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(help=f"Without --config: check every {PATTERN} in this folder.", show_default="configs"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field of --config; repeatable."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a configuration does not comply.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False,
) -> None:
    """Check token budgets: 20 to 26 tokens per active parameter."""
    if override and not config:
        raise ConfigError(f"--set {override[0]}: expected --config with the file that it changes")
    results, problems = _check(select_config_files(config, configs), override or [])
    if not config:
        results.sort(key=lambda result: result.active_parameters)
    if as_json:
        typer.echo(
            json.dumps([{**asdict(result), "verdict": result.verdict.value} for result in results], indent=2)
        )
    elif results:
        typer.echo(printable("\n\n".join(map(_block, results)) + f"\n\n{_summary(results, len(problems))}"))
        if not problems:
            print_next_steps(["dsv3", "plan", *_same(config, configs), *override_options(override)], err=True)
    if problems:
        raise ConfigError("\n".join(problems))
    if strict and not all(result.verdict.accepted for result in results):
        raise typer.Exit(1)


def _same(config: Sequence[Path] | None, configs: Path | None) -> list[object]:
    """The options that select the same files again."""
    named = [word for file in config or () for word in ("--config", file)]
    return [*named, *(["--configs", configs] if configs else [])]


def _check(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[list[Compliance], list[str]]:
    """The results of all readable configs, and the errors of the others."""
    results: list[Compliance] = []
    problems: list[str] = []
    for path in paths:
        try:
            results.append(check_compliance(path.stem, load_config(path, overrides)))
        except ConfigError as error:
            problems.append(str(error))
    return results, problems


def _block(result: Compliance) -> str:
    labelled = {
        "Active params": format_count(result.active_parameters),
        "Target ratio": f"{result.target_ratio} T/P",
        f"Required tokens ({result.target_ratio} T/P)": format_count(result.required_tokens),
        "Total tokens": format_count(result.total_tokens),
        "Actual ratio": f"{format_ratio(result.total_tokens, result.active_parameters)} T/P",
    }
    lines = [f"{label + ':':<28}{value}" for label, value in labelled.items()]
    mark = "✓" if result.verdict.accepted else "✗"
    return "\n".join([_RULE, result.name, _RULE, *lines, f"{mark} {result.verdict.value}: {result.reason}"])


def _summary(results: Sequence[Compliance], unreadable: int) -> str:
    accepted = [result for result in results if result.verdict.accepted]
    deliberate = sum(result.verdict is Verdict.DELIBERATELY_OVERTRAINED for result in accepted)
    words = f"{len(accepted)} of {len(results) + unreadable} configurations comply"
    words += f", {deliberate} deliberately overtrained" if deliberate else ""
    return words + (f"; {unreadable} cannot be read" if unreadable else "")

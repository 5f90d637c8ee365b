"""The command that checks token budgets: `dsv3 validate`, also `python scripts/validate_chinchilla.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.chinchilla import Compliance, Verdict, check_compliance, shown_ratio
from deepseek_v3.utils.errors import ConfigError

_RULE = "=" * 80
_PATTERN = "deepseek_v3_*.yaml"


def validate(
    config: Annotated[list[Path] | None, typer.Option(help="A run's YAML file; repeatable.")] = None,
    configs: Annotated[
        Path | None,
        typer.Option(help=f"Without --config: check every {_PATTERN} in this folder.", show_default="configs"),
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
    if config and configs:
        raise ConfigError(f"--configs {configs}: expected either --config files or a --configs folder, not both")
    if override and not config:
        raise ConfigError(f"--set {override[0]}: expected --config with the file that it changes")
    paths = config or _files_in(configs or _default_folder())
    results, problems = _check(paths, override or [])
    if not config:
        results.sort(key=lambda result: result.active_parameters)
    if as_json:
        typer.echo(
            json.dumps([{**asdict(result), "verdict": result.verdict.value} for result in results], indent=2)
        )
    elif results:
        _echo("\n\n".join(map(_block, results)) + f"\n\n{_summary(results, len(problems))}")
    if problems:
        raise ConfigError("\n".join(problems))
    if strict and not all(result.verdict.accepted for result in results):
        raise typer.Exit(1)


def _check(paths: Sequence[Path], overrides: Sequence[str]) -> tuple[list[Compliance], list[str]]:
    """The judged configs, and what is wrong with those that cannot be read."""
    results: list[Compliance] = []
    problems: list[str] = []
    for path in paths:
        try:
            results.append(check_compliance(path.stem, load_config(path, overrides)))
        except ConfigError as error:
            problems.append(str(error))
    return results, problems


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; --configs names one that holds {_PATTERN} files")
    paths = sorted(folder.glob(_PATTERN))
    if not paths:
        raise ConfigError(f"{folder}: holds no {_PATTERN}; name files with --config or a folder with --configs")
    return paths


def _default_folder() -> Path:
    """`configs` where we stand, or else in the checkout that this package runs from."""
    candidates = (Path("configs"), Path(__file__).parents[3] / "configs")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(f"found no folder {' or '.join(map(str, candidates))}; name one with --configs")


def _block(result: Compliance) -> str:
    labelled = {
        "Active params": _short(result.active_parameters),
        "Target ratio": f"{result.target_ratio} T/P",
        f"Required tokens ({result.target_ratio} T/P)": _short(result.required_tokens),
        "Total tokens": _short(result.total_tokens),
        "Actual ratio": f"{shown_ratio(result.total_tokens, result.active_parameters)} T/P",
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


def _short(number: int) -> str:
    """A count in trillions, billions or millions with two decimals; below 10,000 as it is."""
    for size, unit in ((1e12, "T"), (1e9, "B")):
        if round(number / size, 2) >= 1:
            return f"{number / size:.2f}{unit}"
    return f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"


def _echo(text: str) -> None:
    """Prints text; where the output's encoding has no ✓ and ✗, OK and X stand for them."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("✓", "OK").replace("✗", "X")
        text = plain.encode(encoding, "replace").decode(encoding)
    typer.echo(text)

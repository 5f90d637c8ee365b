"""`dsv3 config counts`: a model's parameters and floating-point operations by part."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import active_conventions, count_active_parts, count_parameters
from deepseek_v3.planning.flops import flops_per_token, forward_flops, mtp_forward_flops
from deepseek_v3.utils.command_line import override_options, print_next_steps
from deepseek_v3.utils.text import humanize, paragraph, side_by_side, table


def counts(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or a shipped size such as 1b.")],
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the raw numbers as one JSON object.")] = False,
) -> None:
    """Count a model's parameters, total and active, and its operations per token, by part."""
    found = counts_of(load_config(config, override or []))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
        print_next_steps(["dsv3", "train", "--config", config, *override_options(override)])


def counts_of(config: RunConfig) -> dict[str, Any]:
    """Parameters by part, total and active; active parameters by convention; operations per token."""
    model, length = config.model, config.training.sequence_length
    total, active = count_parameters(model), count_active_parts(model)
    operations = flops_per_token(model, length, config.parallel.recomputation)
    return {
        "parameters": {**asdict(total), "total": total.total, "with_prediction": total.with_prediction},
        "active_parameters": {**asdict(active), "total": active.total, "with_prediction": active.with_prediction},
        "active_by_convention": active_conventions(model),
        "sequence_length": length,
        "recomputation": config.parallel.recomputation,
        "operations_per_token": {**asdict(operations), "total": operations.total},
        "forward_operations": {
            "model": asdict(forward_flops(model, length)),
            "prediction": asdict(mtp_forward_flops(model, length)),
        },
    }


def _print(found: dict[str, Any]) -> None:
    total, active = found["parameters"], found["active_parameters"]
    rows = [[humanize(part), f"{total[part]:,}", f"{active[part]:,}"] for part in total]
    conventions = [[humanize(name), f"{count:,}"] for name, count in found["active_by_convention"].items()]
    parameters, others = (
        table(["parameters", "all", "active"], rows),
        table(["active by convention", ""], conventions),
    )
    typer.echo("\n".join(side_by_side(parameters, others)))
    typer.echo(paragraph("Here and throughout, active is the first: every weight that a token multiplies with."))
    forward = found["forward_operations"]
    parts = [
        [humanize(part), f"{forward['model'][part]:,}", f"{forward['prediction'][part]:,}"]
        for part in forward["model"]
    ]
    passes = [[humanize(name), f"{count:,}"] for name, count in found["operations_per_token"].items()]
    typer.echo(
        "\n"
        + paragraph(
            f"Operations per token at length {found['sequence_length']:,}, recomputation {found['recomputation']}; "
            "attention is the share of scores in all passes:"
        )
    )
    operations = side_by_side(table(["forward", "model", "prediction"], parts), table(["passes", ""], passes))
    typer.echo("\n".join(operations))

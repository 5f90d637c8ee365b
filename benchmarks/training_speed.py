"""Tokens per second and memory of the trainer as users run it: `python benchmarks/training_speed.py --shape 1b`.

Everything is on: float32 master weights, clipping, bias updates, metrics. Writes `results/training_<shape>.json`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from environment import RESULTS, environment

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.train import train_run
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.logging import configure_logging
from deepseek_v3.utils.monitoring import read_metrics


def main(
    shape: Annotated[str, typer.Option(help="A file of benchmarks/shapes, without its ending.")] = "1b",
    name: Annotated[str | None, typer.Option(help="Name of the result; the shape's if left out.")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Train a shape for its few steps and record how fast it went."""
    configure_logging()
    with tempfile.TemporaryDirectory() as folder:
        places = [f"checkpoint.directory={folder}/checkpoints", f"logging.directory={folder}/run"]
        config = load_config(Path(__file__).parent / "shapes" / f"{shape}.yaml", [*places, *(override or [])])
        train_run(config, select_device("auto"))
        steps = [record for record in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss" in record]
    rates = [record["tokens_per_second"] for record in steps[1:]]  # the first contains the compilation
    figures = {
        "shape": shape,
        "overrides": override or [],
        "tokens_per_step": config.tokens_per_step,
        "steps": steps[-1]["step"],
        "tokens_per_second_median": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "mfu_median": median(record["mfu"] for record in steps[1:]) if "mfu" in steps[-1] else None,
        "memory_gib": max(record["memory_bytes"] for record in steps) / 2**30,
        "loss_first_and_last": [steps[0]["loss"], steps[-1]["loss"]],
    }
    head = environment("torch", "numpy", commit=commit)
    text = json.dumps({**head, "results": figures}, indent=2)
    (RESULTS / f"training_{name or shape}.json").write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)

"""The command that trains: `dsv3 train`, also `python src/training/train.py`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.loading import config_to_yaml, load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.preflight import check_plan
from deepseek_v3.training.trainer import Trainer, TrainingResult
from deepseek_v3.utils.commands import run_command
from deepseek_v3.utils.distributed import refuse_several_processes, select_device
from deepseek_v3.utils.files import written_atomically
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.monitoring import read_metrics
from deepseek_v3.utils.plots import plot_losses


def train(
    config: Annotated[Path, typer.Option(help="The run's YAML file, such as configs/deepseek_v3_tiny.yaml.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="PATH|latest", help="Continue a checkpoint, or the newest good one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Start even where memory is expected not to do.")] = False,
) -> None:
    """Train a model, from the first step or from a checkpoint."""
    configure_logging()
    refuse_several_processes()
    overrides = override or []
    result = train_run(load_config(config, overrides), device, resume, force)
    if not result.finished:
        words = ["dsv3", "train", "--config", str(config), "--resume", "latest"]
        words += [word for setting in overrides for word in ("--set", setting)]
        words += [] if device == "auto" else ["--device", device]
        words += ["--force"] if force else []
        get_logger("Trainer").info(f"Stopped after step {result.step}; continue with: {shlex.join(words)}")


def train_run(
    config: RunConfig, device: str = "auto", resume: str | None = None, force: bool = False
) -> TrainingResult:
    """Trains as `config` says; leaves the resolved config, metrics and a plot of the losses in its run folder.

    A run that is expected not to fit in memory is refused before anything is allocated, unless by `force`.
    """
    chosen = select_device(device)
    check_plan(config, chosen, force)
    trainer = Trainer(config, chosen, resume)
    folder = config.logging.directory
    with written_atomically(folder / "config.yaml") as partial:
        partial.write_text(config_to_yaml(config), encoding="utf-8")
    result = trainer.run()
    plot_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    return result


def main() -> None:
    """Entry point of the launcher script."""
    run_command(train)

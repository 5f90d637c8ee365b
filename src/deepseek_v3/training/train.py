"""The training command: `dsv3 train`, also `python src/training/train.py`."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenize_corpus import PYTHON_STDLIB
from deepseek_v3.training.metrics import plot_run, write_config
from deepseek_v3.training.parallel.auto_layout import resolve_layout
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.preflight import check_memory, describe_device, log_findings
from deepseek_v3.training.profiling import ProfiledSteps
from deepseek_v3.training.run_folders import lock_run_folders
from deepseek_v3.training.samples import check_samples_config
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.training.trainer import Trainer, TrainingResult
from deepseek_v3.utils.command_line import integer_option, override_options, print_next_steps, run_command
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.distributed.launch import ALONE, World, export_environment, process_group, select_device
from deepseek_v3.utils.distributed.watchdog import Watchdog
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.machine import describe_threads, usable_cores


def train(
    config: Annotated[Path, typer.Option(help="The run's YAML file, or a shipped size such as tiny or 1b.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|latest|auto",
            help="Continue a checkpoint, or the newest good one; auto: the newest one if there is any.",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Start from these weights: a checkpoint or a Hugging Face directory. All else is new."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Start even if memory or disk is expected to be too small.")
    ] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="Resume even if other samples come next than in that run."),
    ] = False,
    timeout: Annotated[
        int,
        typer.Option(
            parser=integer_option(at_least=1),
            metavar="SECONDS",
            help="How long a process waits for the other processes.",
        ),
    ] = 600,
    deepspeed: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Train with DeepSpeed's ZeRO, configured by this file."),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS", help="Write a trace and a table of the longest kernels: of 3 steps, or of 10-12."
        ),
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,  # noqa: ARG001 -- deepspeed's
) -> None:
    """Train a model, from the first step or from a checkpoint."""
    world = World.from_environment()
    configure_logging(logging.INFO if world.rank == 0 else logging.ERROR)
    _check_start(init, resume)
    if profile is not None:
        ProfiledSteps.parse(profile)
    overrides = override or []
    place = select_device(device, world)
    limit = timedelta(seconds=timeout)
    group = process_group(world, place, limit, even_alone=deepspeed is not None)
    with GracefulStop(world.size) as stop, group, Watchdog(world, limit) as watchdog:
        settings = DeepSpeedFile(deepspeed) if deepspeed else None
        run = load_config(config, overrides, log=True)
        result = train_run(
            run,
            place,
            resume,
            force,
            world,
            watchdog,
            settings,
            stop,
            allow_changed_data=allow_changed_data,
            init=init,
            profile=profile,
        )
        if world.rank != 0:
            return
        same = [] if device == "auto" else ["--device", device]
        if result.finished:
            checkpoint = ["--checkpoint", str(result.checkpoint), *same]
            prompt = "def main(" if run.data.corpus and run.data.corpus.source == PYTHON_STDLIB else "The"
            print_next_steps(
                ["dsv3", "generate", *checkpoint, "--prompt", prompt],
                ["dsv3", "eval", *checkpoint],
                ["dsv3", "report", run.logging.directory, "--html"],
            )
            return
        launcher = "" if world.is_alone else f"; LAUNCHER starts {world.size} processes as before"
        get_logger("Trainer").info(f"Stopped after step {result.step}{launcher}")
        words = ["--config", str(config), "--resume", "latest", *override_options(overrides), *same]
        words += ["--force"] if force else []
        words += ["--allow-changed-data"] if allow_changed_data else []
        words += ["--deepspeed", str(deepspeed)] if deepspeed else []
        words += ["--profile", profile] if profile else []
        print_next_steps(_command(world, words))


def _check_start(init: Path | None, resume: str | None) -> None:
    """Raises ConfigError if a run would both start from weights and resume a checkpoint."""
    if init is not None and resume not in (None, "auto"):
        raise ConfigError(
            f"found --init {init} and --resume {resume}, expected one of them: --init starts a new run from "
            "weights, --resume continues a run, and --init with --resume auto starts it once and then continues it"
        )


def _command(world: World, words: list[str]) -> list[str]:
    """The command that resumes this run; with several processes it begins with the word LAUNCHER."""
    if world.is_alone:
        return ["dsv3", "train", *words]
    script = ["-m", "deepseek_v3", "train"] if Path(sys.argv[0]).name == "__main__.py" else [sys.argv[0]]
    return ["LAUNCHER", *script, *words]


def train_run(
    config: RunConfig,
    device: torch.device,
    resume: str | None = None,
    force: bool = False,
    world: World = ALONE,
    watchdog: Watchdog | None = None,
    deepspeed: DeepSpeedFile | None = None,
    stop: GracefulStop | None = None,
    *,
    allow_changed_data: bool = False,
    init: Path | None = None,
    profile: str | None = None,
) -> TrainingResult:
    """Trains as `config` says; writes the resolved config, metrics and a plot of the losses to its run folder.

    Every process of a job must call it. `watchdog` is notified of every step, and waits for a checkpoint that is
    being written before it ends the process; `stop` is as in `Trainer.run`. With `deepspeed` DeepSpeed runs the
    steps, which needs a process group even for one process. `resume`, `allow_changed_data`, `init` and
    `profile` are as in `Trainer`.

    Raises PlanError, before it allocates anything, if the run is not expected to fit in memory or on the disk;
    `force` turns this error into a warning.
    """
    described = describe_device(device, world.local_size)
    if device.type == "cpu":
        _use_granted_cores()
    if deepspeed is None:
        config = resolve_layout(config, world.size, described)
    else:
        export_environment(world, device)
        config = deepspeed.resolve_layout(config, world.size)
    check_samples_config(config, world.size, deepspeed is not None)
    check_memory(config, described, force)
    mesh = build_mesh(config.parallel, device.type, world.local_size)
    group = None if world.is_alone else checkpoint_group()
    with lock_run_folders(config, group, resume, force):
        step_begins = watchdog.step if watchdog else None
        trainer = Trainer(
            config,
            device,
            resume,
            mesh,
            step_begins,
            deepspeed,
            allow_changed_data=allow_changed_data,
            init=init,
            profile=profile,
        )
        if watchdog is not None:
            watchdog.finish_first(trainer.abort)
        log_findings(config, described, trainer.tokens, group, device)
        if world.rank == 0:
            write_config(config)
        result = trainer.run(stop)
        if world.rank == 0:
            plot_run(config.logging.directory)
    return result


def _use_granted_cores() -> None:
    """Lowers torch's threads to the cores that this process may use, unless the user set a number; logs them."""
    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    get_logger("Trainer").info(describe_threads(torch.get_num_threads(), cores, os.getloadavg()[0]))


def main() -> None:
    """Entry point of the launcher script."""
    run_command(train)

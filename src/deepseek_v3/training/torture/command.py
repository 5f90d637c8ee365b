"""`dsv3 torture`: kills, stops and damages real training runs, and checks that none of them loses anything."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.training.torture.faults import KINDS, draw_fault
from deepseek_v3.training.torture.tiny_run import run_undisturbed
from deepseek_v3.training.torture.trial import Trial, run_trial, small_disk
from deepseek_v3.utils.command_line import integer_option, print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import atomic_write, output_file_problem
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.monitoring import time_left
from deepseek_v3.utils.text import printable, table

_log = get_logger("Torture")


def torture(
    faults: Annotated[
        int,
        typer.Option(parser=integer_option(at_least=1), metavar="N", help="How many faults to try; 200 nightly."),
    ] = 15,
    seed: Annotated[
        int,
        typer.Option(
            parser=integer_option(at_least=0), help="The first fault's seed; each next one's is one more."
        ),
    ] = 0,
    kinds: Annotated[
        str | None, typer.Option(metavar="KIND,KIND", help=f"Only these kinds: {', '.join(KINDS)}.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write every trial to this file.")
    ] = None,
) -> None:
    """Kill, stop and damage real training runs, and check that each goes on without losing anything."""
    configure_logging()
    chosen = _chosen(kinds)
    if output is not None and (problem := output_file_problem(output)):
        raise ConfigError(f"--output {output}: {problem}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    trials = run_trials(chosen, seed, faults, folder)
    typer.echo(printable("\n".join([*_table(trials), ""])))
    if output is not None:
        _write(output, trials)
    failed = [trial for trial in trials if trial.problem is not None]
    if failed:
        typer.echo(f"{len(failed)} of {len(trials)} faults were not survived; their runs are in {folder}")
        print_next_steps(*map(_repeat, failed))
        raise typer.Exit(1)
    shutil.rmtree(folder)
    print_next_steps(["dsv3", "torture", "--faults", max(200, faults), "--seed", seed + faults])


def run_trials(kinds: Sequence[str], seed: int, faults: int, folder: Path) -> list[Trial]:
    """Tries `faults` faults, kind after kind, from `seed` on; keeps the folders of those that were not survived."""
    with small_disk(folder / "disk") as mounted:
        disk = (
            "a small file system in memory"
            if mounted
            else "an injected ENOSPC, because nothing may be mounted here"
        )
    _log.info(f"A full disk is {disk}; trains the run without faults first, on one and on two ranks")
    undisturbed = {ranks: run_undisturbed(folder, ranks) for ranks in _ranks_of(kinds)}
    counts = {ranks: each.counts for ranks, each in undisturbed.items()}
    start, trials = time.monotonic(), []
    for number in range(faults):
        fault = draw_fault(kinds[number % len(kinds)], seed + number, counts)
        trials.append(run_trial(fault, undisturbed[fault.ranks], folder / f"{fault.kind}-{fault.seed}"))
        rate = len(trials) / (time.monotonic() - start)
        result = trials[-1].problem or "survived"
        _log.info(
            f"{len(trials)}/{faults} {fault.kind} ({fault}), seed {fault.seed}: {result} | "
            f"{60 * rate:.1f} faults/min, {time_left(faults - len(trials), rate)} left"
        )
    return trials


def _chosen(kinds: str | None) -> list[str]:
    """The kinds that an option names; all of them without it. Raises ConfigError for an unknown one."""
    names = list(KINDS) if kinds is None else [name.strip() for name in kinds.split(",")]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds: found {', '.join(unknown)}; expected some of {', '.join(KINDS)}")
    return names


def _ranks_of(kinds: Sequence[str]) -> list[int]:
    return sorted({ranks for kind in kinds for ranks in KINDS[kind].ranks})


def _table(trials: Sequence[Trial]) -> list[str]:
    rows = []
    for kind, about in KINDS.items():
        tried = [trial for trial in trials if trial.fault.kind == kind]
        survived = sum(trial.problem is None for trial in tried)
        if tried:
            seconds = sum(trial.seconds for trial in tried) / len(tried)
            rows.append([kind, about.meaning, str(len(tried)), str(survived), f"{seconds:.1f}"])
    survived = sum(trial.problem is None for trial in trials)
    rows.append(
        ["all", "", str(len(trials)), str(survived), f"{sum(trial.seconds for trial in trials):.0f} in all"]
    )
    return table(["kind", "what happens", "tried", "survived", "seconds"], rows, left=["what happens"])


def _repeat(trial: Trial) -> list[object]:
    """The command that tries this one fault again."""
    return ["dsv3", "torture", "--faults", 1, "--kinds", trial.fault.kind, "--seed", trial.fault.seed]


def _write(path: Path, trials: Sequence[Trial]) -> None:
    records = [
        {**asdict(trial.fault), "seconds": round(trial.seconds, 2), "problem": trial.problem} for trial in trials
    ]
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    _log.info(f"{path} has every trial")

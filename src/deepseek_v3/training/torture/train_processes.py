"""Real training processes: `dsv3 train` on one rank or several, forked from a server that has imported it."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from deepseek_v3.training.torture.faults import Fault
from deepseek_v3.training.torture.strikes import Striker, obey_permissions
from deepseek_v3.training.train import train
from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.fault_points import hooked
from deepseek_v3.utils.process_pool import start_fork_server

CONFIG = "run.yaml"
RANK_TIMEOUT_SECONDS = 20  # `dsv3 train --timeout`: a rank that hangs is reported after nine tenths of it
_LONGEST_SECONDS = 300.0  # of a run of a few steps, on a machine with other work
_IMPORTED = (
    "deepseek_v3.training.train",
    "deepseek_v3.training.loss_curve",
    "deepseek_v3.training.torture.train_processes",
    "torch._dynamo",  # torch imports it when it builds a model, which takes longer than the run
)
_SAVED = re.compile(r"Saved \S*checkpoint_step_(\d+)")
_RESUMED = re.compile(r"Resuming \S+ after step (\d+)")


class Outcome(NamedTuple):
    """How the ranks of a run ended: their exit codes, None for one that had to be killed, and all they printed."""

    codes: tuple[int | None, ...]
    text: str

    @property
    def saved(self) -> list[int]:
        """The steps whose checkpoints the run said to be complete."""
        return [int(step) for step in _SAVED.findall(self.text)]

    @property
    def resumed(self) -> int:
        """The step after which the run went on; 0 for a fresh start."""
        found = _RESUMED.search(self.text)
        return int(found[1]) if found else 0

    @property
    def succeeded(self) -> bool:
        """Whether every rank ended with 0."""
        return set(self.codes) == {0}

    @property
    def last_line(self) -> str:
        """What was printed last, which is the error of a run that failed with one."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["nothing was printed"])[-1]


def train_in(folder: Path, ranks: int, fault: Fault | None = None) -> Outcome:
    """Runs `dsv3 train --resume auto` with the config in `folder`, the working directory of every rank."""
    start_fork_server(_IMPORTED)
    port = _free_port()
    context = multiprocessing.get_context("forkserver")
    outputs = [folder / f"output.{rank}.txt" for rank in range(ranks)]
    processes: list[BaseProcess] = [
        context.Process(target=_train, args=(folder, rank, ranks, port, fault), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + _LONGEST_SECONDS
    stalled = fault.rank if fault is not None and fault.ends_in_a_stall else None
    for rank, process in enumerate(processes):
        if rank != stalled:
            process.join(max(0.0, end - time.monotonic()))
    codes = tuple(process.exitcode for process in processes)
    for process in processes:
        process.kill()
        process.join()
    return Outcome(codes, "".join(path.read_text(encoding="utf-8", errors="replace") for path in outputs))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _train(folder: Path, rank: int, ranks: int, port: int, fault: Fault | None) -> None:
    """The body of a rank's process."""
    _print_to(folder / f"output.{rank}.txt")
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1")
    if ranks > 1:
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in named.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    obey_permissions()
    with hooked(Striker(fault, rank)):
        run_app(lambda: train(Path(CONFIG), resume="auto", device="cpu", force=True, timeout=RANK_TIMEOUT_SECONDS))


def _print_to(path: Path) -> None:
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))

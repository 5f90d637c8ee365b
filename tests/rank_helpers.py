"""Real processes that form one job over gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

_TIMEOUT = timedelta(seconds=60)


def run_ranks(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Runs `work(rank, *arguments)`, a function of a module, in `world` processes; raises the error of any."""
    # Forked from one process that has imported what takes seconds, and holds no threads and locks of this one.
    multiprocessing.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor"])
    with TemporaryDirectory() as folder:
        start_processes(_run, (work, world, folder, arguments), nprocs=world, start_method="forkserver")


def _run(rank: int, work: Callable[..., None], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    work(rank, *arguments)
    dist.destroy_process_group()

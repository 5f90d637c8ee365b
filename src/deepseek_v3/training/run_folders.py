"""Locks on the folders that a run writes, so that no other run writes there at the same time."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.disk_space import check_disk
from deepseek_v3.utils.checkpointing.errors import write_error
from deepseek_v3.utils.distributed.collectives import gather_objects, rank_and_size, run_on_all_ranks
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import remove_leftovers, remove_partials
from deepseek_v3.utils.locks import hold_lock

_LOCK_FILE = ".lock"
_PROBE = "probe"


@contextmanager
def lock_run_folders(
    config: RunConfig, group: ProcessGroup | None, resume: str | None = None, force: bool = False
) -> Iterator[None]:
    """Locks the checkpoint and log folders during a `with` block; all ranks of `group` (gloo) call it.

    Rank 0 takes the locks, removes incomplete files that killed runs left, and checks the disk space. Raises, on
    all ranks, InUseError if another run has locked a folder, DataError if a folder cannot be written,
    CheckpointError if the checkpoint folder cannot be cleaned or is not the same folder on all hosts, and, unless
    `force` is set, PlanError if the disk has too little room.
    """

    def prepare() -> None:
        _take(config, locks)
        _tidy_up(config)
        check_disk(config, resume, force)

    with ExitStack() as locks:
        run_on_all_ranks(group, prepare if rank_and_size(group)[0] == 0 else lambda: None)
        if group is not None:
            _require_one_folder(config.checkpoint.directory, group)
        yield


def _take(config: RunConfig, locks: ExitStack) -> None:
    fields = {
        "checkpoint.directory": config.checkpoint.directory,
        "logging.directory": config.logging.directory,
    }
    held: set[Path] = set()
    for field, folder in fields.items():
        if folder.resolve() not in held:
            held.add(folder.resolve())
            locks.enter_context(hold_lock(folder / _LOCK_FILE, folder, f"choose another with --set {field}=..."))


def _tidy_up(config: RunConfig) -> None:
    """Removes incomplete files that killed runs left."""
    try:
        remove_leftovers(config.checkpoint.directory)
    except OSError as error:
        raise write_error(config.checkpoint.directory, error) from error
    remove_partials(config.checkpoint.directory / _PROBE)
    for name in ("config.yaml", "metrics.jsonl", "loss.png"):
        remove_partials(config.logging.directory / name)


def _require_one_folder(folder: Path, group: ProcessGroup) -> None:
    """Raises CheckpointError on all ranks if any of them cannot open a file that rank 0 has created in `folder`."""
    rank = rank_and_size(group)[0]
    # A fresh name, which no host has cached; `_tidy_up` of the next run removes it if this run dies here.
    probe = folder / gather_objects(group, f".{_PROBE}.{uuid.uuid4().int}.partial")[0]
    try:
        run_on_all_ranks(group, lambda: _write(probe, folder, rank, os.O_CREAT) if rank == 0 else None)
        run_on_all_ranks(group, lambda: _write(probe, folder, rank))
    finally:
        if rank == 0:
            probe.unlink(missing_ok=True)


def _write(probe: Path, folder: Path, rank: int, create: int = 0) -> None:
    try:
        os.close(os.open(probe, os.O_WRONLY | create))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: rank {rank} on host {socket.gethostname()} does not see what rank 0 writes there; "
            "set checkpoint.directory to a folder that all hosts share"
        ) from None
    except OSError as error:
        raise write_error(folder, error) from error

"""The folders that a run writes, held by it alone while it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.utils.checkpoints.failures import unwritable
from deepseek_v3.utils.checkpoints.folders import remove_leftovers
from deepseek_v3.utils.checkpoints.ranks import rank_and_size, together
from deepseek_v3.utils.files import remove_partials
from deepseek_v3.utils.locks import locked

_LOCK_FILE = ".lock"


@contextmanager
def held_folders(config: RunConfig, group: ProcessGroup | None) -> Iterator[None]:
    """Holds the folders of checkpoints and of logs; all ranks of `group`, which is gloo, call it.

    Rank 0 takes the locks, and removes what killed runs left half written. Raises, on all ranks, InUseError where
    another run has one of them, DataError where one cannot be written, and CheckpointError where it cannot be
    tidied up.
    """
    with ExitStack() as locks:
        together(group, lambda: _take(config, locks) if rank_and_size(group)[0] == 0 else None)
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
            locks.enter_context(locked(folder / _LOCK_FILE, folder, f"choose another with --set {field}=..."))
    _tidy_up(config)


def _tidy_up(config: RunConfig) -> None:
    """Removes what runs that were killed left half written."""
    try:
        remove_leftovers(config.checkpoint.directory)
    except OSError as error:
        raise unwritable(config.checkpoint.directory, error) from error
    for name in ("config.yaml", "metrics.jsonl", "loss.png"):
        remove_partials(config.logging.directory / name)

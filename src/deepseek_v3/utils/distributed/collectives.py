"""What the ranks of a job have to agree on when they save or load a checkpoint together.

A group of None stands for a process alone, everywhere in this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from deepseek_v3.utils.errors import UserError

T = TypeVar("T")

# torch.distributed.checkpoint warns where it works without a group, which is what None asks for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoint_group() -> ProcessGroup | None:
    """A new gloo group of all ranks, to be made by all of them at once; None without torch.distributed.

    Saving runs in a thread: its collectives need a group that nothing else uses, and no GPU.
    """
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This process's number within the group, and how many there are."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def gather_objects(group: ProcessGroup | None, value: T) -> list[T]:
    """The value of every rank, on every rank."""
    values = [value] * rank_and_size(group)[1]
    if group is not None:
        dist.all_gather_object(values, value, group=group)
    return values


def any_rank(group: ProcessGroup | None, flags: list[bool]) -> list[bool]:
    """Which of these flags, in the same order on every rank, are set on any rank."""
    numbers = torch.tensor(flags, dtype=torch.uint8)
    if group is not None:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    return [bool(number) for number in numbers.tolist()]


def run_on_all_ranks(group: ProcessGroup | None, work: Callable[[], T]) -> T:
    """Does `work` on every rank; a UserError of any is raised on all, that of the first rank."""
    error: UserError | None = None
    try:
        result = work()
    except UserError as raised:
        error = raised
    for failure in gather_objects(group, error):
        if failure is not None:
            raise failure
    return result


@contextmanager
def raise_first_rank_error() -> Iterator[None]:
    """Raises the first rank's error within torch.distributed.checkpoint, instead of a report of it."""
    try:
        yield
    except CheckpointException as report:
        rank = min(report.failures)
        raise report.failures[rank][0] from None

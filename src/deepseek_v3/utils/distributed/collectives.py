"""Collectives of Python values and errors over a gloo group; a group of None means a single process."""

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

# torch.distributed.checkpoint warns when it works without a group, as it does for a group of None.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoint_group() -> ProcessGroup | None:
    """Creates a gloo group of all ranks; every rank calls this. Returns None without torch.distributed.

    Checkpoints are saved in a thread, whose collectives need a group that nothing else uses, and no GPU.
    """
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group, and the size of the group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def gather_objects(group: ProcessGroup | None, value: T) -> list[T]:
    """Returns the values of all ranks, in the order of ranks, on every rank."""
    values = [value] * rank_and_size(group)[1]
    if group is not None:
        dist.all_gather_object(values, value, group=group)
    return values


def any_rank(group: ProcessGroup | None, flags: list[bool]) -> list[bool]:
    """Returns, for each flag, whether it is set on any rank; all ranks give the same number of flags."""
    numbers = torch.tensor(flags, dtype=torch.uint8)
    if group is not None:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    return [bool(number) for number in numbers.tolist()]


def run_on_all_ranks(group: ProcessGroup | None, work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it raises a UserError on any, raises that of the lowest such rank on all."""
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
    """Turns the report of a failed torch.distributed.checkpoint call into the error of its lowest failed rank."""
    try:
        yield
    except CheckpointException as report:
        rank = min(report.failures)
        raise report.failures[rank][0] from None

"""A pool of processes for tests of several ranks, started once for each module of tests.

Each call runs one function on some of the processes, which form a new process group for it: over gloo, and over
NCCL if they have a GPU each. Every gloo group has threads that wake up a hundred times a second, so a pool frees
the groups of a call when it ends, and does not outlive its module.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers import fork_server

TIMEOUT = 600  # seconds, far more than any call takes; ends a call that hangs


class RankPool:
    """Up to `size` ranks on the CPU or, with "cuda", on one GPU each.

    With `one_group` every call runs on all ranks, in the same process group.
    """

    def __init__(self, size: int, device: str = "cpu", *, one_group: bool = False) -> None:
        self.size, self.device = size, device
        context = multiprocessing.get_context("spawn") if device == "cuda" else fork_server.CONTEXT
        self._folder, self._calls = tempfile.TemporaryDirectory(), count()
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, device, one_group), daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls `function(*arguments)` on `world` ranks; returns their results or raises their errors."""
        store = Path(self._folder.name) / f"store_{next(self._calls)}"
        for rank in range(world):
            self._ends[rank].send((function, arguments, rank, world, store))
        answers = [self._answer(rank) for rank in range(world)]
        for rank in range(world):
            with suppress(OSError):  # the rank has died
                self._ends[rank].send("all have answered")
        errors = [text for ok, text in answers if not ok]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def close(self) -> None:
        """Asks the processes to end, and kills those that do not."""
        for end in self._ends:
            with suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self._ends[rank].poll(2 * TIMEOUT):
            self.close()
            raise AssertionError(f"rank {rank} does not answer")
        try:
            return self._ends[rank].recv()
        except EOFError:
            return False, f"rank {rank} has died"


def _serve(end: Connection, device: str, one_group: bool) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported need not be searched for garbage after every call
    logging.disable(logging.DEBUG)  # torch makes a record for each tensor that it saves
    while (task := end.recv()) is not None:
        function, arguments, rank, world, store = task
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        try:
            if device == "cuda":
                torch.cuda.set_device(rank)
            if not dist.is_initialized():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                    store=dist.FileStore(str(store), world),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=TIMEOUT),
                )
            end.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001 -- the test that asked shall see any of them
            end.send((False, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            end.recv()  # if a rank left at once, those that still join the group would fail
            gc.collect()  # groups that are only part of reference cycles
            if dist.is_initialized() and not one_group:
                dist.destroy_process_group()

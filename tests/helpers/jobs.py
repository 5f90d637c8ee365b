"""Jobs of a few real ranks, each with its own output file, that may end in any way."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.logging import configure_logging
from helpers import fork_server

HANGS = 600.0  # seconds after which a test gives up on a process; far more than any takes

_PRINTED_BY_US = re.compile(
    r"\[(?!Gloo)[A-Z][a-z]+\] |error: |Traceback|\w*Error: "
)  # torch logs `[W1128 08:10 ...`


def free_port() -> int:
    """A free port below the range from which the kernel takes ports for outgoing connections."""
    while True:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", 10_000 + secrets.randbelow(10_000)))
            return found.getsockname()[1]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: each rank's exit code (None if it was still running), and the lines of all ranks."""

    codes: list[int | None]
    lines: list[str]


class Job:
    """`size` ranks that run `work(world)` as a command does; rank 0 or a launcher hosts the rendezvous store."""

    def __init__(self, folder: Path, size: int, work: Callable[[World], None], *, launcher: bool = False) -> None:
        self._folder, port = folder, free_port()
        self.launcher = _started(_host_store, port) if launcher else None
        worlds = [World(rank, size, rank, size, "127.0.0.1", port, launcher) for rank in range(size)]
        self.ranks = [_started(_run_rank, world, work, folder / f"{world.rank}.txt") for world in worlds]

    def outcome(self, stopped: tuple[int, ...] = ()) -> Outcome:
        """Waits for all ranks except the `stopped` ones, then kills every process that is left."""
        end = time.monotonic() + HANGS
        for rank, process in enumerate(self.ranks):
            if rank not in stopped:
                process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in [*self.ranks, *([self.launcher] if self.launcher else [])]:
            process.kill()
            process.join()
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(self._folder.glob("*.txt")))
        return Outcome(codes, [line for line in text.splitlines() if _PRINTED_BY_US.match(line)])


def _started(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = fork_server.CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def write_output_to(path: Path) -> None:
    """Lets this process and its libraries print to a file."""
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))


def _run_rank(world: World, work: Callable[[World], None], output: Path) -> None:
    write_output_to(output)
    torch.set_num_threads(1)
    configure_logging()
    run_app(lambda: work(world))


def _host_store(port: int) -> None:
    timeout = timedelta(seconds=HANGS)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timeout)
    assert store
    time.sleep(2 * HANGS)

"""Where tasks run: in this process, in several on this machine, or on a Ray cluster. Results come in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from types import TracebackType
from typing import Any

import pyarrow as pa

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.optional import missing_library
from deepseek_v3.utils.process_pool import exit_with_parent, start_fork_server
from deepseek_v3.utils.redaction import redact


class Executor(ABC):
    """Runs independent tasks, which leave their work whole or not at all, and so may be stopped or run twice."""

    @abstractmethod
    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        """Calls `function` with each tuple of arguments; `done` hears of each result as it comes.

        Raises DataError where a worker died.
        """

    def close(self) -> None:  # noqa: B027 -- there may be nobody to let go
        """Lets the workers go."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InProcessExecutor(Executor):
    """One task after the other, here."""

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        for each in arguments:
            done(function(*each))


class ProcessExecutor(Executor):
    """Worker processes on this machine. They start while the run is still being planned, and end when it ends."""

    def __init__(self, workers: int) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        for _ in range(workers):
            self._pool.submit(os.getpid)

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        futures = [self._pool.submit(function, *each) for each in arguments]
        try:
            waiting: set[Future[Any]] = set(futures)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; what it had finished is kept: run the "
                "same command again, with fewer workers or a smaller work_unit_size if memory ran out"
            ) from None
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayExecutor(Executor):
    """Tasks on a Ray cluster whose machines share the file system; without an address, on this machine."""

    def __init__(self, workers: int, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise DataError(missing_library("engine = ray", "ray")) from None
        self._ray = ray
        options: dict[str, Any] = {"num_cpus": workers} if address is None else {"address": address}
        try:
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            problem = f"ray_address = {address}: no Ray cluster answers: {error}"
            raise DataError(redact(problem, address or "")) from None

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        remote = self._ray.remote(_with_copies)
        waiting = [remote.remote(function, *each) for each in arguments]
        try:
            while waiting:
                finished, waiting = self._ray.wait(waiting)
                for reference in finished:
                    done(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None

    def close(self) -> None:
        self._ray.shutdown()


def _with_copies(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function with copies of the arguments: Ray's arrays are read-only, which compiled code may refuse."""
    return function(*deepcopy(arguments))


def _start_worker() -> None:
    """Keeps a worker to one thread, and lets it end with the process that started the run."""
    pa.set_cpu_count(1)
    exit_with_parent()

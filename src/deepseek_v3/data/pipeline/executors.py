"""Executors run the tasks of a run: in this process, in worker processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.utils.errors import DataError, translate_resource_errors
from deepseek_v3.utils.optional import missing_library
from deepseek_v3.utils.process_pool import WorkerPool, start_fork_server
from deepseek_v3.utils.redaction import redact

RESUME_ADVICE = (
    "what it had finished is kept: run the same command again, with fewer workers or a smaller work_unit_size if "
    "memory ran out"
)

# The modules that the fork server imports for all worker processes. It skips a module that cannot be imported.
_TASK_MODULES = ("deepseek_v3.data.pipeline.tasks", "deepseek_v3.data.pipeline.registry")
_DEDUPLICATION_MODULES = ("deepseek_v3.data.deduplication.kernels.numba_kernels",)


def preload_workers(config: PreprocessConfig) -> None:
    """Starts the fork server, which imports the modules that the worker processes of a run need.

    Returns before the imports end, so that this process can make its own imports and plan the run at the same time.
    """
    deduplicates = {"deduplication", "exact_deduplication"} & {*config.pipeline}
    start_fork_server([*_TASK_MODULES, *(_DEDUPLICATION_MODULES if deduplicates else ())])


class Executor(ABC):
    """Runs independent tasks. A task publishes its result atomically, so it may be stopped, or run twice."""

    @abstractmethod
    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        """Calls `function` with each tuple of arguments, and `done` with each result as soon as it is available.

        Results may come in any order. Raises DataError if a worker process died.
        """

    def close(self) -> None:  # noqa: B027 -- an executor may have no workers
        """Stops the workers."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InProcessExecutor(Executor):
    """Runs one task after the other in this process."""

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        for each in arguments:
            done(run_task(function, *each))


class ProcessExecutor(Executor):
    """Runs tasks in worker processes of this machine, which start immediately and end with the run."""

    def __init__(self, workers: int) -> None:
        self._pool = WorkerPool(workers, pa.set_cpu_count, (1,), advice=RESUME_ADVICE)

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], done: Callable[[Any], None]
    ) -> None:
        self._pool.run(run_task, [(function, *each) for each in arguments], done)

    def close(self) -> None:
        self._pool.close()


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster whose machines share a file system, or on this machine if `address` is None."""

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
    """Calls a function with copies of the arguments: arrays from Ray are read-only, which Numba may refuse."""
    return run_task(function, *deepcopy(arguments))


def run_task(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function with arguments of which the first path is where it writes.

    Raises ResourceError, which a worker can send and which names that path, if the machine lacks what it needs.
    """
    target = next((argument for argument in arguments if isinstance(argument, Path)), "a task of this run")
    with translate_resource_errors(target, RESUME_ADVICE):
        return function(*arguments)

"""Worker processes on this machine: they ignore Ctrl-C, and they never outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any, TypeVar

from deepseek_v3.utils.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerPool:
    """A pool of `workers` processes, forked from a server that imports `modules` once.

    All workers start immediately, and `close` ends them. Each first calls `initializer(*arguments)`. If a worker
    process dies, `run` and `map` raise DataError, whose message ends with `advice`.
    """

    def __init__(
        self,
        workers: int,
        initializer: Callable[..., None],
        arguments: tuple[Any, ...] = (),
        *,
        modules: Sequence[str] = (),
        advice: str,
    ) -> None:
        start_fork_server(modules)
        self._workers, self._advice = workers, advice
        self._executor = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("forkserver"),
            initializer=_start_worker,
            initargs=(initializer, arguments),
        )
        # A process that starts while another one dies may never end (Python 3.11), so all start now.
        for _ in range(workers):
            self._executor.submit(os.getpid)

    def run(
        self, function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]], done: Callable[[Result], None]
    ) -> None:
        """Calls `function` with each tuple of arguments; passes each result to `done` once available."""
        futures = [self._executor.submit(function, *each) for each in arguments]
        try:
            with self._dead_workers_reported():
                waiting: set[Future[Result]] = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done(future.result())
        finally:
            for future in futures:
                future.cancel()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """Yields `function(item)` for each item, in order; reads at most two items per worker ahead."""
        waiting: deque[Future[Result]] = deque()
        with self._dead_workers_reported():
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) > 2 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def close(self) -> None:
        """Ends the workers after the calls that they are running now."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _dead_workers_reported(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise DataError(f"a worker process was killed, perhaps for lack of memory; {self._advice}") from None


def start_fork_server(modules: Sequence[str] = ()) -> None:
    """Starts the process that workers are forked from, which imports `modules`; does nothing if it runs already.

    That process and all workers ignore Ctrl-C, even while they import: only the process that started them handles
    it. A Ctrl-C that arrives during this call is delivered to this process afterwards.
    """
    if modules:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    resource_tracker.ensure_running()  # otherwise the server starts it, and that unblocks the signal
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # child processes inherit the mask
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def exit_with_parent() -> None:
    """Makes this worker process exit when its parent ends for any reason, and ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _start_worker(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    exit_with_parent()
    initializer(*arguments)


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

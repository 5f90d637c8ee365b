"""The engine in a thread of its own, and what the event loop learns of its requests.

The event loop gives orders, which the thread carries out between two steps. After a step the thread writes down how
far each request has come and wakes the loop once. Tokens and text stay in the request: a client that reads slowly
gets larger parts, and there is no queue that could grow. The engine decodes text and finds stop strings in this
thread, because a stop string ends the request and gives its pages back; on a GPU it does so while the device
computes the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from deepseek_v3.inference.engine.engine import Engine
from deepseek_v3.inference.engine.generation_request import FinishReason, Request
from deepseek_v3.inference.server.server_metrics import ServerMetrics
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.logging import get_logger

_log = get_logger("Engine")


class Progress(NamedTuple):
    """How far a request has come: the tokens and the characters of its text that are final, and why it ended."""

    num_tokens: int = 0
    num_characters: int = 0
    finish_reason: FinishReason | None = None


class RequestGroup:
    """The requests that answer one HTTP request. `progress` has an entry for each of them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.progress = [Progress() for _ in requests]
        self._changed = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Whether all requests have ended."""
        return all(each.finish_reason is not None for each in self.progress)

    def wake(self) -> None:
        """Tells the event loop, in whose thread this is called, that `progress` has changed."""
        self._changed.set()

    async def change(self) -> None:
        """Waits until `progress` has changed since the last call."""
        await self._changed.wait()
        self._changed.clear()

    async def finish(self) -> None:
        """Waits until all requests have ended."""
        while not self.is_finished:
            await self.change()


@dataclass
class _Followed:
    """A request in the engine: its place in its group, and when it came and got its last token, in seconds."""

    group: RequestGroup
    index: int
    last: float
    num_tokens: int = 0


class EngineThread:
    """Runs an engine in a thread. Its methods are called in the event loop.

    If a step raises an error, all requests fail, `on_failure` is called in the event loop, and the thread ends.
    """

    def __init__(self, engine: Engine, metrics: ServerMetrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._followed: dict[Request, _Followed] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self.failure: str | None = None

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._engine.num_waiting

    def start(self, on_failure: Callable[[], None]) -> None:
        """Starts the thread, which will wake the event loop that runs now."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def submit(self, group: RequestGroup) -> None:
        """Adds the requests of a group to the engine."""
        self._orders.put(partial(self._add, group, time.perf_counter()))
        if self.failure is not None:  # the thread may have ended before it saw the order
            _set_failed(group)

    def cancel(self, group: RequestGroup) -> None:
        """Ends those requests of a group that have not finished."""
        self._orders.put(partial(self._cancel, group))

    async def stop(self) -> None:
        """Ends all requests and the thread."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while self._carry_out_orders():
                if self._engine.has_work:
                    self._publish(self._engine.step())
        except Exception as error:  # noqa: BLE001 -- whatever it is, clients must not wait for ever
            _log.error("the engine has failed", exc_info=error)
            self._fail(error)
        self._engine.close()
        self._publish(list(self._followed))

    def _carry_out_orders(self) -> bool:
        """Waits for an order if there is nothing to compute. False if the thread is to end."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.has_work)
            except Empty:
                return True
            if order is None:
                return False
            order()

    def _add(self, group: RequestGroup, arrival: float) -> None:
        for index, request in enumerate(group.requests):
            self._followed[request] = _Followed(group, index, arrival)
            try:
                self._engine.add(request)
            except GenerationError as error:
                request.fail(error)
        self._publish([each for each in group.requests if each.finish_reason is not None])

    def _cancel(self, group: RequestGroup) -> None:
        followed = [request for request in group.requests if request in self._followed]
        for request in followed:
            self._engine.cancel(request)
        self._publish(followed)

    def _fail(self, error: Exception) -> None:
        self.failure = str(error) or type(error).__name__
        while not self._orders.empty():
            if (order := self._orders.get()) is not None:
                order()
        for request in self._followed:
            request.finish("failed")
        self._publish(list(self._followed))
        self._in_loop(self._on_failure)

    def _publish(self, requests: Iterable[Request]) -> None:
        """Writes down how far some requests have come, and wakes the event loop once for all of them."""
        now = time.perf_counter()
        groups: dict[RequestGroup, None] = {}
        for request in requests:
            followed = self._followed[request]
            self._count(request, followed, now)
            progress = Progress(followed.num_tokens, len(request.text.shown), request.finish_reason)
            followed.group.progress[followed.index] = progress
            groups[followed.group] = None
            if request.finish_reason is not None:
                self._metrics.count_finished(request.finish_reason)
                del self._followed[request]
        if groups:
            self._in_loop(partial(_wake, list(groups)))

    def _count(self, request: Request, followed: _Followed, now: float) -> None:
        num_tokens = len(request.ids) - request.num_prompt
        if num_tokens == followed.num_tokens:
            return
        if followed.num_tokens:
            self._metrics.count_next_token(now - followed.last)
        else:
            self._metrics.count_first_token(request.num_prompt, now - followed.last)
        followed.num_tokens, followed.last = num_tokens, now

    def _in_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call)


def _wake(groups: Iterable[RequestGroup]) -> None:
    for group in groups:
        group.wake()


def _set_failed(group: RequestGroup) -> None:
    group.progress[:] = [each._replace(finish_reason=each.finish_reason or "failed") for each in group.progress]
    group.wake()

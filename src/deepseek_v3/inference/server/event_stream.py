"""Answers that are sent while the engine generates them, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deepseek_v3.inference.server.api_errors import ApiError

_DONE = b"data: [DONE]\n\n"
# A proxy must neither keep a stream nor collect it.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientLeftError(Exception):
    """The client has closed the connection, or reads nothing."""


class EventStream(Response):
    """Sends JSON objects as server-sent events, and `[DONE]` at the end; an ApiError becomes the last object.

    `finish` is called at the end, also when the client leaves, or when it reads nothing for `write_seconds`. The
    connection's own buffer is all that waits for a slow client: the next object is made once there is room.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[dict[str, Any]], finish: Callable[[], None], write_seconds: float
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks, self._finish, self._write_seconds = chunks, finish, write_seconds
        self._sending_since: float | None = None

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response (ASGI)."""
        try:
            await unless_client_leaves(receive, self._send_all(send), self._is_stuck, self._write_seconds / 4)
        except ClientLeftError:
            pass
        finally:
            self._finish()

    def _is_stuck(self) -> bool:
        return self._sending_since is not None and time.monotonic() - self._sending_since > self._write_seconds

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await self._send_event(send, b"data: %b\n\n" % orjson.dumps(chunk))
        except ApiError as error:
            await self._send_event(send, b"data: %b\n\n" % orjson.dumps(error.body))
        await self._send_event(send, _DONE, more=False)

    async def _send_event(self, send: Send, event: bytes, more: bool = True) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": event, "more_body": more})
        self._sending_since = None


async def unless_client_leaves(
    receive: Receive,
    work: Awaitable[None],
    is_stuck: Callable[[], bool] = lambda: False,
    check_seconds: float | None = None,
) -> None:
    """Waits for `work`; cancels it and raises ClientLeftError once the client has left or `is_stuck` says so."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        while not working.done():
            await asyncio.wait((working, leaving), timeout=check_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and (leaving.done() or is_stuck()):
                raise ClientLeftError
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

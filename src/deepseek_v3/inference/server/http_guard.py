"""What every HTTP request passes before the application sees it: host, key, load, type and size of the body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from deepseek_v3.inference.server.api_errors import ApiError, overloaded
from deepseek_v3.inference.server.server_metrics import ServerMetrics
from deepseek_v3.utils.text import format_value

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PUBLIC = ("/", "/page.css", "/page.js", "/health")  # need no key
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SPARE_REQUESTS = 16  # beyond the completions that are admitted, to be refused with a reason
_BODY_SECONDS = 30.0  # for a client to send its body
_DISCARDED = 2**26  # bytes of a body that is too long which are read, so that the client sees why it is refused
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True)
class GuardRules:
    """`key`: what clients have to know, None for nothing. `max_body`: bytes. `max_open`: completions at a time.

    `only_loopback`: whether the server listens to this machine alone.
    """

    key: str | None
    max_body: int
    max_open: int
    only_loopback: bool


class HttpGuard:
    """An ASGI application around another one, which gets each accepted request with its whole body.

    Without a key, a server that listens to this machine alone answers only to its own names: otherwise a page in a
    browser could reach it under a name of its own (DNS rebinding). A body has to be declared as JSON, which a
    foreign page cannot do unasked.
    """

    def __init__(self, app: App, rules: GuardRules, metrics: ServerMetrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request (ASGI)."""
        if scope["type"] != "http":
            return
        send = self._with_headers(send)
        is_post = scope["method"] == "POST"
        self._num_open += is_post
        try:
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope, headers)
            body = await self._body(headers, receive) if is_post else b""
        except ApiError as error:
            await send_error(send, error)
            return
        else:
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._num_open -= is_post

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        """Raises ApiError for a request that is refused because of its headers."""
        host = headers.get(b"host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._rules.only_loopback and self._rules.key is None and name.lower() not in _LOOPBACK:
            raise ApiError(
                403,
                f"host {format_value(host)}: expected localhost or 127.0.0.1; to serve under another name, start "
                "the server with an API key",
                code="unknown_host",
            )
        if self._rules.key is not None and scope["path"] not in _PUBLIC:
            self._check_key(headers.get(b"authorization", ""), self._rules.key)
        if scope["method"] == "POST" and self._num_open > self._rules.max_open + _SPARE_REQUESTS:
            raise overloaded(f"{self._num_open:,} requests are open; try again later")

    @staticmethod
    def _check_key(authorization: str, key: str) -> None:
        scheme, _, given = authorization.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), key.encode())  # takes as long for every wrong key
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "the API key is missing or wrong; expected the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        """The body of a request. Raises ApiError for one that is too long, too slow or not declared as JSON."""
        if headers.get(b"content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "expected a body with the header Content-Type: application/json", code="not_json")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > _DISCARDED:
            raise self._too_long()
        try:
            return await asyncio.wait_for(self._read(receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s", code="timeout") from None

    async def _read(self, receive: Receive) -> bytes:
        body, num_bytes, has_more = bytearray(), 0, True
        while has_more and num_bytes <= _DISCARDED:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the connection was closed before the body was complete", code="incomplete")
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes <= self._rules.max_body:
                body += part
            has_more = message.get("more_body", False)
        if num_bytes > self._rules.max_body:
            raise self._too_long()
        return bytes(body)

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than the {self._rules.max_body:,} bytes that this server takes; shorten it",
            code="body_too_long",
            headers={"Connection": "close"},
        )

    def _with_headers(self, send: Send) -> Send:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
                self._metrics.count_response(message["status"])
            await send(message)

        return guarded


async def send_error(send: Send, error: ApiError) -> None:
    """Sends an error as a response (ASGI)."""
    body = orjson.dumps(error.body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then what the connection gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

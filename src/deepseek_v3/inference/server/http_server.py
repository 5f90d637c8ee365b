"""Runs the application over HTTP until it is told to stop, and then ends it in order."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from deepseek_v3.inference.server.service import Service
from deepseek_v3.utils.errors import ConfigError

# For an idle connection. Clients end theirs after 5 to 60 s, and a server that is quicker fails their next request.
_IDLE_SECONDS = 75
_CLOSE_SECONDS = 2  # for connections to close once the last answer is sent


@dataclass
class StopRequest:
    """Asks a server to stop: `begin` in order, `hurry` without waiting for answers; both are of its event loop."""

    begin: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self) -> None:
        """The first call asks the server to stop, the second one to do so at once."""
        (self.hurry if self.begin.is_set() else self.begin).set()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, to which nobody can connect yet; port 0 takes any free port.

    Raises ConfigError if the address does not exist or is in use.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        is_used = error.errno == errno.EADDRINUSE
        advice = "choose another port, or end the program that uses it" if is_used else "choose another address"
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; {advice}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The address of a bound socket for a browser on this machine."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- only compared
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_until_stopped(
    app: Any,
    service: Service,
    bound: socket.socket,
    stop: StopRequest,
    seconds_to_stop: float,
    on_ready: Callable[[], None],
) -> None:
    """Answers requests until `stop` is requested or the engine fails.

    From then on new requests are refused. Open ones may finish within `seconds_to_stop`; what is left ends with an
    error. `on_ready` is called when the server takes connections.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = _Server(config, on_ready)
    service.start()
    serving = asyncio.ensure_future(server.serve([bound]))
    ends = [asyncio.ensure_future(event.wait()) for event in (stop.begin, service.failed)]
    await asyncio.wait((serving, *ends), return_when=asyncio.FIRST_COMPLETED)
    await service.stop(seconds_to_stop, stop.hurry)
    server.should_exit = True
    await serving
    for each in ends:
        each.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server, without its signal handlers: the caller has his own."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

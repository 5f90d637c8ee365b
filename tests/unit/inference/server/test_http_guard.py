"""What is refused before the application sees it: keys, hosts, types and sizes, over HTTP."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from deepseek_v3.inference.server import http_guard
from deepseek_v3.inference.server.http_guard import GuardRules, HttpGuard, Message
from deepseek_v3.inference.server.server_metrics import ServerMetrics
from deepseek_v3.inference.server.service import ServerLimits
from helpers.servers import CONTEXT, running_server

BODY = {"prompt": "a", "max_tokens": 1}
KEY = "correct-horse"
LIMITS = ServerLimits(CONTEXT, max_running=2, max_waiting=2, max_body=1000)


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """A client of a server that asks for a key."""
    with running_server(LIMITS, key=KEY) as server, server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a server without a key."""
    with running_server(LIMITS) as server, server.client() as found:
        yield found


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer ü"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_key_nothing_is_told(guarded: httpx.Client, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode())]
    method = "POST" if path == "/v1/completions" else "GET"
    response = guarded.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_with_the_key_everything_is_served(guarded: httpx.Client) -> None:
    headers = {"Authorization": f"bearer {KEY}", "Host": "any.example"}
    assert guarded.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    for path in ("/metrics", "/v1/models", "/openapi.json"):
        assert guarded.get(path, headers=headers).status_code == 200


def test_page_and_health_need_no_key(guarded: httpx.Client) -> None:
    for path in ("/", "/page.css", "/page.js", "/health"):
        response = guarded.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:80", 200), ("evil.example:8000", 403), ("", 403)],
)
def test_only_names_of_this_machine_are_answered(client: httpx.Client, host: str, status: int) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_has_to_be_declared_as_json(client: httpx.Client, kind: str | None) -> None:
    """A page of another site can send these types without being asked for permission."""
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415


def chunks(number: int) -> Iterator[bytes]:
    """A body without a declared length, of 100 bytes each."""
    for _ in range(number):
        yield b" " * 100


@pytest.mark.parametrize("length", [1001, 300_000])
@pytest.mark.parametrize("is_declared", [True, False])
def test_a_long_body_is_refused(client: httpx.Client, length: int, is_declared: bool) -> None:
    content = b" " * length if is_declared else chunks(1 + length // 100)
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert "1,000 bytes" in response.json()["error"]["message"]
    assert response.headers["connection"] == "close"


def guard_answer(monkeypatch: pytest.MonkeyPatch, headers: list[tuple[bytes, bytes]], parts: list[Message]) -> int:
    """The status with which a guard answers a POST of these parts; then nothing more arrives."""
    monkeypatch.setattr(http_guard, "_BODY_SECONDS", 0.01)
    statuses = []

    async def receive() -> Message:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop(0)

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def refuse(*_: object) -> None:
        raise AssertionError("the request was let through")

    rules = GuardRules(None, max_body=10, max_open=1, only_loopback=False)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(HttpGuard(refuse, rules, ServerMetrics())(scope, receive, send))
    return statuses[0]


JSON_TYPE = (b"content-type", b"application/json; charset=utf-8")


def test_a_slow_body_and_a_huge_one_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert guard_answer(monkeypatch, [JSON_TYPE], [part]) == 408
    assert guard_answer(monkeypatch, [JSON_TYPE, (b"content-length", b"9" * 12)], []) == 413
    assert guard_answer(monkeypatch, [JSON_TYPE], [part, {"type": "http.disconnect"}]) == 400


def test_a_body_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "_DISCARDED", 1000)
    parts = [{"type": "http.request", "body": b" " * 100, "more_body": True} for _ in range(100)]
    assert guard_answer(monkeypatch, [JSON_TYPE], parts) == 413
    assert len(parts) > 80


def test_more_requests_than_can_wait_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "_SPARE_REQUESTS", -1)
    assert guard_answer(monkeypatch, [JSON_TYPE], []) == 429

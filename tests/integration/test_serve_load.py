"""The server under load: many streams, clients that leave or do not read, an engine that fails, and its end.

Afterwards no request is left in the engine, and every page of the cache is free; `running_server` checks it.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.inference.server.service import ServerLimits, Service
from helpers.servers import CONTEXT, PATIENCE, HeldEngine, RunningServer, chat_tokenizer, running_server, tiny_model

STREAMS = 200
TOKENS, LEAVERS_TOKENS = 12, 24  # of the texts; of those whose clients leave
PROMPTS = ["the cat", "ein Fuchs", "ü", "", "läuft über die Straße", "?" * 58]  # the last one grows beyond a page
LONG = {"prompt": "the cat", "max_tokens": 500, "temperature": 0}


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for another thread; a test that waits in vain fails."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@contextmanager
def held_server(limits: ServerLimits | None = None, **options: float) -> Iterator[tuple[RunningServer, HeldEngine]]:
    """A server whose engine computes nothing until the test, or its end, frees it."""
    with running_server(limits, **options) as server:
        engine = HeldEngine(server.service)
        try:
            yield server, engine
        finally:
            engine.free()


async def read_stream(client: httpx.AsyncClient, body: dict[str, object], leaves: bool) -> str:
    """The text of a stream; a client that leaves does so when it has got some of the text."""
    text = ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if leaves and text:
                break
    return text


def wait_for_leaving_clients(service: Service, most_tokens: int) -> None:
    """Keeps texts of `LEAVERS_TOKENS` from growing beyond `most_tokens`, however slow their clients are."""
    engine, orders = service._engine._engine, service._engine._orders
    step = engine.step

    def wait_or_step() -> list[Request]:
        while any(
            request.sampling.max_new_tokens == LEAVERS_TOKENS and len(request.generated) >= most_tokens
            for request in engine._scheduler._running
        ):
            if not orders.empty():
                return []
            time.sleep(0.001)
        return step()

    engine.step = wait_or_step  # type: ignore[method-assign]


def test_two_hundred_streams_get_the_texts_they_get_alone() -> None:
    """A third of the clients leave in the middle; prompts and parameters are mixed, so that leaks would show."""
    generator = Generator(tiny_model(), chat_tokenizer())
    samplings = [SamplingConfig(0), SamplingConfig(0.9, 0.9, seed=5)]
    bodies, leavers_bodies = (
        [
            {"prompt": prompt, "max_tokens": tokens, "temperature": s.temperature, "top_p": s.top_p, "seed": s.seed}
            for s in samplings
            for prompt in PROMPTS
        ]
        for tokens in (TOKENS, LEAVERS_TOKENS)
    )
    wanted, leavers_wanted = (
        [
            each.text
            for s in samplings
            for prompt in PROMPTS
            for each in generator.generate([prompt], replace(s, max_new_tokens=tokens))
        ]
        for tokens in (TOKENS, LEAVERS_TOKENS)
    )
    limits = ServerLimits(CONTEXT, max_running=32, max_waiting=STREAMS, max_body=10_000)

    async def run(url: str) -> list[str]:
        pool = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=pool) as client:
            streams = [
                read_stream(
                    client, (leavers_bodies if leaves(place) else bodies)[place % len(bodies)], leaves(place)
                )
                for place in range(STREAMS)
            ]
            return await asyncio.gather(*streams)

    with running_server(limits, num_pages=20) as server:  # fewer pages than the streams want: some are preempted
        wait_for_leaving_clients(server.service, TOKENS)
        texts = asyncio.run(run(server.url))
        wait_until(lambda: server.service.num_open == 0)
        metrics = httpx.get(server.url + "/metrics", timeout=PATIENCE).text
    for place, text in enumerate(texts):
        if leaves(place):
            whole = leavers_wanted[place % len(bodies)]
            assert whole.startswith(text)
            assert len(text) < len(whole)
        else:
            assert text == wanted[place % len(bodies)]
    assert f'dsv3_http_responses_total{{status="200"}} {STREAMS}' in metrics


def leaves(place: int) -> bool:
    """Whether the client in this place leaves in the middle of its text."""
    return place % 3 == 0


def test_a_client_that_leaves_gives_its_place_to_the_next() -> None:
    limits = ServerLimits(CONTEXT, max_running=1, max_waiting=0, max_body=10_000)
    with held_server(limits) as (server, engine), server.client() as client:
        for is_stream in (True, False):
            with socket.create_connection(server.service_address) as leaving:
                leaving.sendall(raw_request({**LONG, "stream": is_stream}))
                wait_until(lambda: server.service.num_open == 1)
                refused = client.post("/v1/completions", json=LONG)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) > 0
                assert refused.json()["error"]["type"] == "rate_limit_error"
            wait_until(lambda: server.service.num_open == 0 and server.pool.num_free == server.pool.num_pages)
        engine.free()
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200


def raw_request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(content), content)


def test_a_client_that_does_not_read_is_given_up() -> None:
    """Its text waits in the request, and no more than the buffers of one connection are filled."""
    limits = ServerLimits(CONTEXT, max_running=8, max_waiting=8, max_body=10_000, write_seconds=0.2)
    body = {"prompt": "the cat", "max_tokens": 500, "temperature": 0, "n": 8, "logprobs": 20, "stream": True}
    with held_server(limits) as (server, engine), socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(server.service_address)
        reader.sendall(raw_request(body))
        wait_until(lambda: server.service.num_open == 8)
        engine.free()
        wait_until(lambda: server.service.num_open == 0)
        assert httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200


def test_clients_may_leave_before_their_body_is_there() -> None:
    with running_server() as server:
        for part in (
            b"",
            b"POST /v1/comp",
            raw_request(LONG)[:-20],
            b"\x16\x03\x01\x00\xff" * 50,
            b"GET / HTTP/9\r\n\r\n",
        ):
            with socket.create_connection(server.service_address) as connection:
                connection.sendall(part)
        assert (
            httpx.post(server.url + "/v1/completions", json={**LONG, "max_tokens": 2}, timeout=PATIENCE).status_code
            == 200
        )


def test_open_answers_are_finished_before_the_end() -> None:
    with held_server(seconds_to_stop=PATIENCE) as (server, engine), server.client() as client:
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                httpx.post(server.url + "/v1/completions", json={**LONG, "max_tokens": 9}, timeout=PATIENCE)
            )
        )
        waiting.start()
        wait_until(lambda: server.service.num_open == 1)
        server.request_stop()
        wait_until(lambda: client.get("/health").status_code == 503)
        refused = client.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert "retry-after" in refused.headers
        engine.free()
        waiting.join(PATIENCE)
        assert [answer.status_code for answer in answers] == [200]
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("hurries", [False, True])
def test_what_takes_too_long_is_ended(hurries: bool) -> None:
    """After the time to stop, or at once at the second request to stop."""
    with held_server(seconds_to_stop=60 if hurries else 0) as (server, engine):
        answers: dict[bool, httpx.Response] = {}

        def ask(is_stream: bool) -> None:
            body = {**LONG, "stream": is_stream}
            answers[is_stream] = httpx.post(server.url + "/v1/completions", json=body, timeout=PATIENCE)

        threads = [threading.Thread(target=ask, args=(is_stream,)) for is_stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(server.service._open) == 2)
        server.request_stop()
        if hurries:
            server.request_stop()
        wait_until(lambda: server.service._is_ending)
        engine.free()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers[False].status_code == 503
        *_, error, done, _ = answers[True].text.split("\n\n")
        assert "the server is stopping" in error
        assert done == "data: [DONE]"


def test_a_failed_engine_ends_requests_and_server(caplog: pytest.LogCaptureFixture) -> None:
    with running_server() as server:
        engine = HeldEngine(server.service)

        def break_down() -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        engine.step = break_down
        engine.free()
        answer = httpx.post(server.url + "/v1/completions", json=LONG, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
        assert "CUDA" not in answer.text
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
    assert server.service.failure == "CUDA error: an illegal memory access"
    assert "an illegal memory access" in caplog.text


def test_damaged_weights_end_the_request_alone() -> None:
    model = tiny_model()
    kept = model.head_weight_VD.data.clone()
    with running_server() as server, server.client() as client:
        forward = server.service._engine._engine._forward
        head, forward._head = forward._head, forward._head * float("nan")  # type: ignore[union-attr]
        answer = client.post("/v1/completions", json=LONG)
        assert answer.status_code == 500
        assert "logits are NaN or infinite" in answer.json()["error"]["message"]
        stream = client.post("/v1/completions", json={**LONG, "stream": True})
        assert "logits are NaN or infinite" in stream.text
        forward._head = head  # type: ignore[union-attr]
        assert client.post("/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200
    assert kept.equal(model.head_weight_VD.data)

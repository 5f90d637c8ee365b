"""A server with a tiny model, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.chat_template import ChatTemplate, template_of
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.row_counts import RowCounts, measure_row_counts
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.server.app import create_app
from deepseek_v3.inference.server.http_server import StopRequest, address_of, bind, serve_until_stopped
from deepseek_v3.inference.server.service import ServedModel, ServerLimits, Service
from deepseek_v3.interop.huggingface import save_pretrained
from deepseek_v3.mla.kv_compression import PagePool, pages_of
from deepseek_v3.model.transformer import DeepSeekV3
from helpers.models import small_config, small_model

CONTEXT = 512
PATIENCE = 60.0  # seconds that a test waits for a server or another thread; it then fails
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' if m.role == "
    "'assistant' else '' }}{{ m.content }}{% endfor %}{{ '<|Assistant|>' if add_generation_prompt else '' }}"
)


@cache
def chat_tokenizer(with_template: bool = True) -> Tokenizer:
    """A small tokenizer, with the markers of a chat and, if wanted, the template."""
    trained = Tokenizer.train(["the cat sat on the mat\n", "ein Fuchs läuft über die Straße\n"] * 3, vocab_size=300)
    tokenizer = HuggingFaceTokenizer.from_str(trained.to_json())
    names = ("<|begin|>", "<|User|>", "<|Assistant|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    fields = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>", "add_bos_token": False}
    template = {"chat_template": TEMPLATE} if with_template else {}
    return Tokenizer(tokenizer.to_str(), ends=["<|endoftext|>"], config={**fields, **template})


@cache
def tiny_model() -> DeepSeekV3:
    """A model with random weights and room for `CONTEXT` tokens, which almost never ends a text."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "vocab_size": chat_tokenizer().vocab_size, "max_position_embeddings": CONTEXT}
    return small_model(small_config(**sizes)).eval()


def save_tiny_model(folder: Path, with_template: bool = True) -> Path:
    """Writes the model as a Hugging Face directory of that name in the folder."""
    save_pretrained(tiny_model(), folder / "tiny", tokenizer=chat_tokenizer(with_template), dtype=torch.float32)
    return folder / "tiny"


class HeldEngine:
    """Keeps an engine from computing anything until it is `free`; it carries out orders all the same."""

    def __init__(self, service: Service) -> None:
        self._orders, engine = service._engine._orders, service._engine._engine
        self.step, engine.step = engine.step, self._held_step  # type: ignore[method-assign]
        self._is_free = threading.Event()

    def free(self) -> None:
        self._is_free.set()

    def _held_step(self) -> list[Request]:
        while not self._is_free.wait(0.002):
            if not self._orders.empty():
                return []
        return self.step()


@dataclass
class RunningServer:
    """A server that answers at `url`."""

    url: str
    service: Service
    pool: PagePool
    stop: StopRequest
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def service_address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> httpx.Client:
        """A client that waits long enough for a busy machine."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def request_stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.request)

    def assert_empty(self) -> None:
        """Nothing is left of any request: neither in the engine nor in the cache nor in the service."""
        engine = self.service._engine
        assert (engine.num_running, engine.num_waiting, self.service.num_open) == (0, 0, 0)
        assert not engine._followed
        assert not self.service._open
        assert self.pool.num_free == self.pool.num_pages


def new_service(
    limits: ServerLimits | None = None, with_template: bool = True, num_pages: int | None = None
) -> tuple[Service, PagePool]:
    limits = limits or ServerLimits(CONTEXT, max_running=8, max_waiting=300, max_body=2**20)
    tokenizer, model = chat_tokenizer(with_template), tiny_model()
    generator = Generator(model, tokenizer, limits.max_running)
    generator.__dict__["_row_counts"] = _row_counts()  # measured once for all servers
    pool = generator.kv_cache.new_pool(num_pages or limits.max_running * pages_of(limits.context))
    template = ChatTemplate(tokenizer) if template_of(tokenizer) else None
    return Service(ServedModel("tiny", tokenizer, template, model.config.vocab_size), generator, pool, limits), pool


@cache
def _row_counts() -> RowCounts:
    return measure_row_counts(tiny_model(), torch.float32)


@contextmanager
def running_server(
    limits: ServerLimits | None = None,
    key: str | None = None,
    with_template: bool = True,
    seconds_to_stop: float = 5,
    num_pages: int | None = None,
) -> Iterator[RunningServer]:
    """Runs a server until the end of the block, and checks that nothing of any request is left then."""
    ready, started = threading.Event(), []
    service, pool = new_service(limits, with_template, num_pages)
    bound = bind("127.0.0.1", 0)

    def run() -> None:
        async def main() -> None:
            started.append((stop := StopRequest(), asyncio.get_running_loop()))
            app = create_app(service, key, only_loopback=True)
            await serve_until_stopped(app, service, bound, stop, seconds_to_stop, ready.set)

        asyncio.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    [(stop, loop)] = started
    server = RunningServer(address_of(bound), service, pool, stop, loop, thread)
    try:
        yield server
    finally:
        if thread.is_alive():
            server.request_stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    server.assert_empty()

"""What the server does with a request: admits it, turns it into requests to the engine, and ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.chat_template import ChatTemplate
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.inference.server.api_errors import ApiError, engine_failed, overloaded, stopping
from deepseek_v3.inference.server.engine_thread import EngineThread, RequestGroup
from deepseek_v3.inference.server.request_bodies import ChatBody, CompletionBody, GenerationBody, Prompt
from deepseek_v3.inference.server.server_metrics import ServerMetrics
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.errors import DataError, GenerationError
from deepseek_v3.utils.text import format_value, pluralize

_SECONDS_TO_END = 5.0  # for streams to send their last event once their requests are cancelled


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it; `num_ids`: the ids that a prompt may hold are below it."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    num_ids: int


@dataclass(frozen=True)
class ServerLimits:
    """Limits of the server.

    `context`: tokens of a prompt with its answer. `max_running`, `max_waiting`: completions that the engine
    computes together, and that wait beside them. `max_body`: bytes of a request. `write_seconds`: how long a client
    may leave unread what is sent to it.
    """

    context: int
    max_running: int
    max_waiting: int
    max_body: int
    write_seconds: float = 60.0

    @property
    def max_open(self) -> int:
        """Completions that are admitted at a time."""
        return self.max_running + self.max_waiting


class Service:
    """Serves one model. All methods run in the event loop, and the engine in a thread of its own."""

    def __init__(self, model: ServedModel, generator: Generator, pool: PagePool, limits: ServerLimits) -> None:
        self.model, self.limits = model, limits
        self.metrics = ServerMetrics()
        self.created = int(time.time())
        self._generator, self._pool = generator, pool
        engine = generator.new_engine(pool)
        generator.warm_up(engine)
        self._engine = EngineThread(engine, self.metrics)
        self._open: dict[RequestGroup, None] = {}
        self._num_open = 0
        self._idle = asyncio.Event()
        self._is_stopping = self._is_ending = False
        self.failed = asyncio.Event()

    def start(self) -> None:
        """Starts the engine."""
        self._engine.start(on_failure=self.failed.set)

    @property
    def failure(self) -> str | None:
        """Why the engine has failed; None if it has not."""
        return self._engine.failure

    @property
    def num_open(self) -> int:
        """Completions whose HTTP requests have not ended."""
        return self._num_open

    def require_readiness(self) -> None:
        """Raises ApiError if no new request is taken, because the server stops or the engine has failed."""
        if self._engine.failure is not None:
            raise engine_failed()
        if self._is_stopping:
            raise stopping()

    async def begin_completion(self, body: CompletionBody) -> RequestGroup:
        """Starts the requests of a body: `n` for each prompt. Raises ApiError, GenerationError and DataError."""
        prompts = body.prompts
        return await self._begin(body, len(prompts), lambda: prompts)

    async def begin_chat(self, body: ChatBody) -> RequestGroup:
        """Starts the `n` requests of a conversation. Raises ApiError, GenerationError and DataError."""
        template = self.model.template
        if template is None:
            raise ApiError(
                400,
                "this model has no chat template, so it continues text only: use /v1/completions, or start the "
                "server with --chat-template FILE",
                code="no_chat_template",
            )
        return await self._begin(body, 1, lambda: [template.prompt([each.fields for each in body.messages])])

    def end(self, group: RequestGroup) -> None:
        """Ends what is left of a group's requests, and lets others take their place."""
        if group in self._open:
            del self._open[group]
            self._release(len(group.requests))
            if not group.is_finished:
                self._engine.cancel(group)

    async def stop(self, seconds: float, hurry: asyncio.Event) -> None:
        """Refuses new requests, and ends those that are open after `seconds`, or at once when `hurry` is set."""
        self._is_stopping = True
        await self._become_idle(seconds, hurry)
        self._is_ending = True
        for group in self._open:
            self._engine.cancel(group)
        await self._become_idle(_SECONDS_TO_END, asyncio.Event())
        await self._engine.stop()

    def metrics_text(self) -> str:
        """The metrics in the text format of Prometheus."""
        return self.metrics.text(
            {
                "dsv3_requests_running": ("Completions that the engine computes.", self._engine.num_running),
                "dsv3_requests_waiting": ("Completions that wait for their turn.", self._engine.num_waiting),
                "dsv3_requests_open": ("Completions whose HTTP requests have not ended.", self._num_open),
                "dsv3_cache_pages": (f"Pages of {PAGE} tokens in the latent cache.", self._pool.num_pages),
                "dsv3_cache_pages_free": ("Pages of the latent cache that are free.", self._pool.num_free),
            }
        )

    async def _begin(
        self, body: GenerationBody, num_prompts: int, prompts: Callable[[], Sequence[Prompt]]
    ) -> RequestGroup:
        """Admits the requests of a body, makes them in another thread, and gives them to the engine."""
        self.require_readiness()
        self.check_model(body.model)
        number = num_prompts * body.n
        self._admit(number)
        try:
            group = RequestGroup(await asyncio.to_thread(lambda: self._requests(body, prompts())))
            if self._is_ending:
                raise stopping()
        except BaseException:
            self._release(number)
            raise
        self._open[group] = None
        self._engine.submit(group)
        return group

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for the name of another model; without a name, the one that is served is meant."""
        if name not in (None, self.model.name):
            message = f"model {format_value(name)} is not served here, but {format_value(self.model.name)} is"
            raise ApiError(404, message, "model", "model_not_found")

    def _admit(self, number: int) -> None:
        if not number:
            raise ApiError(400, "prompt: is empty, expected a text or ids", "prompt", "invalid_value")
        if number > self.limits.max_open:
            message = f"{number:,} completions are asked for, expected at most {self.limits.max_open:,}"
            raise ApiError(400, message, "n", "invalid_value")
        if self._num_open + number > self.limits.max_open:
            raise overloaded(
                f"{self._num_open:,} completions run or wait, of at most {self.limits.max_open:,}; try again later"
            )
        self._num_open += number
        self._idle.clear()

    def _release(self, number: int) -> None:
        self._num_open -= number
        if not self._num_open:
            self._idle.set()

    def _requests(self, body: GenerationBody, prompts: Sequence[Prompt]) -> list[Request]:
        """The requests of a body, those of the first prompt first; each has its own number of the seed."""
        requests: list[Request] = []
        for prompt in prompts:
            ids, shown = self._encode(prompt)
            sampling = self._sampling(body, len(ids))
            numbers = range(len(requests), len(requests) + body.n)
            requests += [self._generator.request(ids, shown, number, sampling) for number in numbers]
        return requests

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and those of them whose text the answer continues."""
        if isinstance(prompt, str):
            try:
                return self._generator.encode(prompt)
            except DataError as error:
                raise ApiError(400, str(error), "prompt", "invalid_value") from None
        if not prompt or min(prompt) < 0 or max(prompt) >= self.model.num_ids:
            message = f"prompt: expected one or more ids from 0 to {self.model.num_ids - 1:,}"
            raise ApiError(400, message, "prompt", "invalid_value")
        return prompt, prompt

    def _sampling(self, body: GenerationBody, num_prompt: int) -> SamplingConfig:
        """How to continue a prompt of this many tokens."""
        context = self.limits.context
        if num_prompt + (body.most_tokens or 1) > context:
            given = pluralize(num_prompt, "token")
            asked = "" if body.most_tokens is None else f" and the answer up to {body.most_tokens:,}"
            raise ApiError(
                400,
                f"the prompt has {given}{asked}, expected at most {context:,} with its answer; shorten the prompt, "
                "or lower max_tokens",
                code="context_length_exceeded",
            )
        try:
            return body.sampling(context - num_prompt)
        except GenerationError as error:
            raise ApiError(400, str(error), str(error).partition(" = ")[0], "invalid_value") from None

    async def _become_idle(self, seconds: float, hurry: asyncio.Event) -> None:
        """Waits until no completion is open, for at most `seconds`, and not once `hurry` is set."""
        if not self._num_open:
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, hurry)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()

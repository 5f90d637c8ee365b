"""The JSON of answers: whole, or in chunks while the engine generates them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar, NamedTuple
from uuid import uuid4

from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.server.api_errors import ApiError, engine_failed, stopping
from deepseek_v3.inference.server.engine_thread import Progress, RequestGroup
from deepseek_v3.inference.server.request_bodies import CompletionBody, GenerationBody
from deepseek_v3.inference.server.service import ServedModel
from deepseek_v3.inference.server.token_logprobs import chat_logprobs, completion_logprobs

_REASONS = {"stop": "stop", "end_of_text": "stop", "length": "length", "context": "length"}

Json = dict[str, Any]


class Part(NamedTuple):
    """What follows in the answer of a request between two moments: text, and tokens by their numbers."""

    request: Request
    choice: int
    text: str
    first_token: int
    end_token: int
    finish_reason: str | None


class Reply(ABC):
    """The answer to an HTTP request, as JSON.

    `whole` needs a group that has finished. `chunks` yields the parts as they come, and then the usage, if it is
    asked for. Both raise ApiError if the engine has failed or the server stops.
    """

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, model: ServedModel, body: GenerationBody, group: RequestGroup) -> None:
        self._model, self._body, self._group = model, body, group
        self._id, self._created = f"{self.id_prefix}-{uuid4().hex}", int(time.time())

    @property
    def is_stream(self) -> bool:
        """Whether the answer is sent in parts."""
        return self._body.stream

    def whole(self) -> Json:
        """The complete answer."""
        progress = self._group.progress
        choices = [self._whole_choice(self._part(index, Progress(), each)) for index, each in enumerate(progress)]
        return {**self._head(self.whole_object), "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[Json]:
        """The parts of the answer."""
        sent = [Progress()] * len(self._group.requests)
        for index in range(len(sent)):
            for choice in self._opening_choices(index):
                yield self._chunk(choice)
        while any(each.finish_reason is None for each in sent):
            await self._group.change()
            for index, progress in enumerate(self._group.progress):
                if progress != sent[index] and (part := self._part(index, sent[index], progress)):
                    sent[index] = progress
                    if self._is_worth_a_chunk(part):
                        yield self._chunk(self._chunk_choice(part))
        if self._body.stream_options.include_usage:
            yield {**self._head(self.chunk_object), "choices": [], "usage": self._usage()}

    def _part(self, index: int, sent: Progress, progress: Progress) -> Part:
        request, reason = self._group.requests[index], progress.finish_reason
        if reason is not None and reason not in _REASONS:
            raise _failure(request, reason)
        text = request.text.shown[sent.num_characters : progress.num_characters]
        finish_reason = None if reason is None else _REASONS[reason]
        return Part(request, index, text, sent.num_tokens, progress.num_tokens, finish_reason)

    def _is_worth_a_chunk(self, part: Part) -> bool:
        """Whether there is anything to send: not for a token without text, such as a part of a character."""
        has_logprobs = self._body.num_logprobs is not None and part.end_token > part.first_token
        return bool(part.text) or has_logprobs or part.finish_reason is not None

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self._body.stream_options.include_usage else {}
        return {**self._head(self.chunk_object), "choices": [choice], **usage}

    def _usage(self) -> Json:
        """Tokens; a prompt counts once, however many answers it gets."""
        prompts = sum(request.num_prompt for request in self._group.requests[:: self._body.n])
        answers = sum(progress.num_tokens for progress in self._group.progress)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    @abstractmethod
    def _opening_choices(self, index: int) -> list[Json]:
        """What is sent before the first token."""

    @abstractmethod
    def _whole_choice(self, part: Part) -> Json: ...

    @abstractmethod
    def _chunk_choice(self, part: Part) -> Json: ...


class CompletionReply(Reply):
    """The answer of /v1/completions."""

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: ServedModel, body: CompletionBody, group: RequestGroup) -> None:
        super().__init__(model, body, group)
        self._prompts = [self._prompt_text(request) if body.echo else "" for request in group.requests]
        self._offsets = [len(prompt) for prompt in self._prompts]

    def _prompt_text(self, request: Request) -> str:
        start = len(self._model.tokenizer.prompt_start)
        return self._model.tokenizer.decode(request.ids[start : request.num_prompt])

    def _opening_choices(self, index: int) -> list[Json]:
        if not self._prompts[index]:
            return []
        return [{"index": index, "text": self._prompts[index], "logprobs": None, "finish_reason": None}]

    def _whole_choice(self, part: Part) -> Json:
        choice = self._chunk_choice(part)
        return {**choice, "text": self._prompts[part.choice] + choice["text"]}

    def _chunk_choice(self, part: Part) -> Json:
        logprobs = None
        if self._body.num_logprobs is not None:
            tokens = slice(part.first_token, part.end_token)
            logprobs, end = completion_logprobs(
                self._model.tokenizer, part.request, tokens, self._offsets[part.choice]
            )
            self._offsets[part.choice] = end
        return {"index": part.choice, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}


class ChatReply(Reply):
    """The answer of /v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _opening_choices(self, index: int) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _whole_choice(self, part: Part) -> Json:
        return self._choice(part, "message", {"role": "assistant", "content": part.text})

    def _chunk_choice(self, part: Part) -> Json:
        return self._choice(part, "delta", {"content": part.text} if part.text else {})

    def _choice(self, part: Part, name: str, text: Json) -> Json:
        logprobs = None
        if self._body.num_logprobs is not None:
            tokens = slice(part.first_token, part.end_token)
            logprobs = {"content": chat_logprobs(self._model.tokenizer, part.request, tokens), "refusal": None}
        return {"index": part.choice, name: text, "logprobs": logprobs, "finish_reason": part.finish_reason}


def _failure(request: Request, reason: str) -> ApiError:
    """Why a request has ended without an answer."""
    if reason == "cancelled":
        return stopping()
    return engine_failed() if request.error is None else ApiError(500, str(request.error))

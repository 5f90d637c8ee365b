"""The bodies of requests: the parameters of OpenAI's API that are served, and some of vLLM's.

A field that is null counts as not given, and so does an unsupported one whose value changes nothing, because many
clients send those. Every other unknown field is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepseek_v3.inference.sampling import SamplingConfig

Prompt = str | list[int]

_DEFAULT_TOKENS = 16  # of a completion, as OpenAI's API has it; an answer in a chat may fill the context
_MOST_CHOICES, _MOST_STOPS, _MOST_TOP_LOGPROBS = 128, 16, 20
# Values with which an unsupported field changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

StopString = Annotated[str, Field(min_length=1, max_length=256)]
Natural = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream holds beside its text."""

    include_usage: bool = False


class GenerationBody(_Body):
    """The parameters that completions and chats share.

    `seed`: without one, every request gets another. `user` and `metadata` are accepted and have no effect.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = Field(default_factory=lambda: secrets.randbits(63))
    stop: StopString | Annotated[list[StopString], Field(max_length=_MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        return {
            key: value
            for key, value in body.items()
            if value is not None and not any(value == neutral for neutral in _NEUTRAL.get(key, ()))
        }

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as fit in the context."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """For how many of the most probable tokens log-probabilities are wanted; None: not even for the chosen."""
        raise NotImplementedError

    def sampling(self, room: int) -> SamplingConfig:
        """How to sample at most `room` tokens. Raises GenerationError for a value that is out of bounds."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return SamplingConfig(
            self.temperature,
            self.top_p,
            self.top_k if self.top_k > 0 else None,  # 0 and -1 are off, as in vLLM
            self.repetition_penalty,
            self.seed,
            room if self.most_tokens is None else self.most_tokens,
            stop,
            min_p=self.min_p,
            logprobs=self.num_logprobs,
        )


class CompletionBody(GenerationBody):
    """The body of /v1/completions. A prompt is a text or a list of ids; several are answered together."""

    prompt: Prompt | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP_LOGPROBS)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: log-probabilities of prompts are not computed")
        return self

    @property
    def most_tokens(self) -> int:
        """The most tokens of an answer."""
        return _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """For how many of the most probable tokens log-probabilities are wanted; None: not even for the chosen."""
        return self.logprobs

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [each for each in self.prompt if isinstance(each, int)]
        return [ids] if ids else [each for each in self.prompt if not isinstance(each, int)]


class TextPart(_Body):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        """What a chat template sees: the developer is the system, and the content is one text."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": parts, **({} if self.name is None else {"name": self.name})}


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same limit, expected one of the two")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as fit in the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """For how many of the most probable tokens log-probabilities are wanted; None: not even for the chosen."""
        return (self.top_logprobs or 0) if self.logprobs else None

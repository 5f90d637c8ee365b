"""The generation engine: continuous batching of requests over the paged latent cache.

Requests are added and cancelled between any two steps. A step computes chunks of prompts and one token of every
other running request, and samples their next tokens on the device. On a GPU the host reads the tokens of a step
after it has launched the next one, so the GPU never waits for it; a request that a token ends has then run one step
too many, whose token is dropped.

Axes: B batch, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_v3.inference.engine.generation_request import Request, TokenLogprobs
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.inference.engine.sampler import Choice, choose_tokens
from deepseek_v3.inference.engine.scheduler import Plan, Scheduler
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.host_copy import HostCopy


class Forward(Protocol):
    """The forward pass over the latent cache; the sequences have room for the new tokens already."""

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor: ...

    def decode(self, sequences: Sequence[CachedSequence], tokens_B: Tensor) -> Tensor: ...

    def logits(self, states_BD: Tensor) -> Tensor: ...


class Chosen(NamedTuple):
    """The tokens of a `Choice` on the host, -1 for logits that are not finite, and its log-probabilities."""

    tokens: list[Any]
    logprobs: list[list[Any]] | None


class HostChoice(NamedTuple):
    """A choice of tokens whose copy to the host is under way."""

    tokens: HostCopy
    logprobs: list[HostCopy] | None

    def read(self) -> Chosen:
        """Waits for the copies."""
        logprobs = None if self.logprobs is None else [copy.read() for copy in self.logprobs]
        return Chosen(self.tokens.read(), logprobs)


class _Launched(NamedTuple):
    """A step that the device computes: its requests, their tokens there, and the copies of these to the host."""

    requests: list[Request]
    tokens_B: Tensor
    choice: HostChoice


class Engine:
    """Runs requests, from the oldest to the youngest, over one forward pass and one scheduler.

    `num_ids`: only ids below it are sampled. `reads_late`: whether the host reads tokens one step late.
    """

    def __init__(
        self, forward: Forward, scheduler: Scheduler, device: torch.device, num_ids: int, reads_late: bool
    ) -> None:
        self._forward, self._scheduler, self._device = forward, scheduler, device
        self._num_ids, self._reads_late = num_ids, reads_late
        self._launched: _Launched | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or read anything."""
        return self._launched is not None or not self._scheduler.is_empty

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._scheduler.num_waiting

    def add(self, request: Request) -> None:
        """Takes a request. Raises GenerationError for one that can never fit in the cache."""
        self._scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, which may have finished already, and gives its pages back."""
        if request.finish_reason is None:
            request.finish("cancelled")
            self._scheduler.drop_finished()

    def close(self) -> None:
        """Cancels all requests, which gives all pages back."""
        self._launched = None
        self._scheduler.finish_all()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Computes one step; returns the requests that got a token or finished, to which it has been added."""
        launched = self._launch(self._scheduler.plan())
        read, self._launched = (self._launched, launched) if self._reads_late else (launched, None)
        return [] if read is None else self._read(read)

    def _launch(self, plan: Plan) -> _Launched | None:
        """Starts the computation of a step; None if no request gets a token by it."""
        states: list[Tensor] = []
        requests: list[Request] = []
        if plan.decoding:
            requests += plan.decoding
            sequences = [request.sequence for request in plan.decoding if request.sequence is not None]
            states.append(self._forward.decode(sequences, self._last_tokens(plan.decoding)))
        if plan.prefilling:
            states_BD = self._forward.prefill([chunk for _, chunk in plan.prefilling])
            complete = [
                row for row, (request, chunk) in enumerate(plan.prefilling) if chunk.end == request.num_tokens
            ]
            requests += [plan.prefilling[row][0] for row in complete]
            states.append(states_BD.index_select(0, self._on_device(complete)))
        if not requests:
            return None
        logits_BV = self._forward.logits(torch.cat(states))[:, : self._num_ids]
        choice = choose_tokens(logits_BV, requests)
        for request in requests:
            request.num_pending += 1
        return _Launched(requests, choice.tokens_B, copy_to_host(choice))

    def _last_tokens(self, requests: Sequence[Request]) -> Tensor:
        """The last token of each request, (B,), taken from the device if it is pending."""
        if self._launched is not None and self._launched.requests == requests:
            return self._launched.tokens_B.clamp(min=0)
        known_B = self._on_device([request.ids[-1] for request in requests])
        if self._launched is None or not any(request.num_pending for request in requests):
            return known_B
        rows = {id(request): row for row, request in enumerate(self._launched.requests)}
        places = [rows[id(request)] if request.num_pending else -1 for request in requests]
        places_B = self._on_device(places)
        pending_B = self._launched.tokens_B[places_B.clamp(min=0)].clamp(min=0)
        return torch.where(places_B < 0, known_B, pending_B)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device, non_blocking=True)

    def _read(self, launched: _Launched) -> list[Request]:
        """Adds the tokens of a step to their requests; returns those that had not finished before."""
        for request in launched.requests:
            request.num_pending -= 1
        advanced = add_tokens(launched.requests, launched.choice)
        if any(request.finish_reason is not None for request in advanced):
            self._scheduler.drop_finished()
        return advanced


def copy_to_host(choice: Choice) -> HostChoice:
    """Starts the copies of chosen tokens to the host."""
    logprobs = None if choice.logprobs is None else [HostCopy(values) for values in choice.logprobs]
    return HostChoice(HostCopy(choice.tokens_B), logprobs)


def add_tokens(requests: Sequence[Request], choice: HostChoice) -> list[Request]:
    """Adds the chosen tokens to their requests, except those that have finished; returns the others.

    A request whose logits are not finite fails.
    """
    chosen = choice.read()
    running = [row for row, request in enumerate(requests) if request.finish_reason is None]
    for row in running:
        add_token(requests[row], chosen, row)
    return [requests[row] for row in running]


def add_token(request: Request, choice: Chosen, row: int) -> None:
    """Adds the token of one row of a choice to its request, which fails if the logits are not finite."""
    token, wanted = choice.tokens[row], request.sampling.logprobs
    if token < 0:
        request.fail(_not_finite())
    elif choice.logprobs is None or wanted is None:
        request.take(token)
    else:
        chosen, ids, values = (each[row] for each in choice.logprobs)
        request.take(token, TokenLogprobs(chosen, tuple(zip(ids, values, strict=True))[:wanted]))


def _not_finite() -> GenerationError:
    return GenerationError(
        "the model's logits are NaN or infinite: its weights are damaged, or its training diverged; "
        "use an earlier checkpoint"
    )

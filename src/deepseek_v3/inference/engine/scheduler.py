"""Which requests run, and what each of them computes in the next step of the engine."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool, pages_of
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.errors import GenerationError


class Plan(NamedTuple):
    """One step: chunks of some requests, and requests whose last token is computed. Their pages are allocated.

    With the last token of a request its drafts are computed; the chunk that holds that token ends with them.
    """

    prefilling: list[tuple[Request, Chunk]]
    decoding: list[Request]


class Scheduler:
    """Admits requests in the order in which they arrive, while their pages fit in the pool.

    A running request grows page by page. If none is left, the youngest running request gives its pages back and
    waits; once there is room its tokens are computed again. The oldest one always goes on: each fits alone, or is
    refused when it is added. A step computes up to `max_running` requests, and about `prefill_tokens` tokens of
    chunks beside one token of each of the others, and their drafts, at most `speculate` each.
    """

    def __init__(self, pool: PagePool, max_running: int, prefill_tokens: int, speculate: int = 0) -> None:
        self._pool, self._max_running, self._prefill_tokens = pool, max_running, prefill_tokens
        self._speculate = speculate
        # Both in the order of arrival. Every running request is older than every waiting one.
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether all requests have finished."""
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn. Raises GenerationError for one that can never fit in the cache."""
        require_room(request, self._pool.num_pages, self._pool.layout.could_be_fp8)
        if request.finish_reason is None:
            self._waiting.append(request)

    def drop_finished(self) -> None:
        """Forgets the requests that have finished."""
        self._running = [request for request in self._running if request.finish_reason is None]
        self._waiting = deque(request for request in self._waiting if request.finish_reason is None)

    def finish_all(self) -> None:
        """Cancels all requests."""
        for request in (*self._running, *self._waiting):
            request.finish("cancelled")
        self.drop_finished()

    def plan(self) -> Plan:
        """Chooses what the next step computes, and allocates its pages."""
        self._admit()
        plan, budget = Plan([], []), self._prefill_tokens
        for request in list(self._running):
            uncached = request.num_uncached
            if request.sequence is None or not uncached:
                continue
            if uncached == 1 and request.num_tokens > request.num_prompt:
                if self._grow(request, 1 + self._rows_ahead(request)):
                    plan.decoding.append(request)
                continue
            number = self._chunk_length(request, budget)
            start = request.sequence.length
            is_last = start + number == request.num_tokens
            if number and self._grow(request, number + (self._rows_ahead(request) if is_last else 0)):
                budget -= number
                drafts = [draft.token for draft in request.drafts] if is_last else []
                ids = [*request.ids[start : start + number], *drafts]
                chunk = Chunk(request.sequence, start, ids, is_prompt=start < request.num_prompt)
                plan.prefilling.append((request, chunk))
        return plan

    def _admit(self) -> None:
        """Starts the oldest waiting requests for whose tokens there is room beside those that run."""
        if not self._waiting:
            return
        ahead = max(1, 2 * self._speculate - 1)  # rows of a step: the next token, or drafts and rows made of drafts
        promised = sum(pages_of(each.num_tokens + ahead) - _num_pages(each) for each in self._running)
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            promised += pages_of(min(request.num_tokens + ahead, request.most_tokens))
            if promised > self._pool.num_free:
                return
            request.sequence = CachedSequence(self._pool)
            self._running.append(self._waiting.popleft())

    def _rows_ahead(self, request: Request) -> int:
        """Rows behind the known tokens that a step takes: of drafts, and of new drafts but the last one."""
        wanted = len(request.drafts) + max(0, self._speculate - 1)
        if not wanted:
            return 0
        return min(wanted, request.most_tokens - request.num_tokens)

    def _chunk_length(self, request: Request, budget: int) -> int:
        """How many tokens of a request to compute; the chunks of a prompt that do not end it end a page."""
        assert request.sequence is not None
        start = request.sequence.length
        if start >= request.num_prompt:
            return min(request.num_uncached, max(budget, 0))
        left = request.num_prompt - start
        if left <= budget:
            return left
        at_least = PAGE if budget == self._prefill_tokens else 0
        return min(left, max(at_least, budget // PAGE * PAGE))

    def _grow(self, request: Request, number: int) -> bool:
        """Makes room for new tokens of a running request; the youngest requests give way, the last one itself."""
        assert request.sequence is not None
        needed = pages_of(request.sequence.length + number) - len(request.sequence.pages)
        while needed > self._pool.num_free:
            youngest = self._running.pop()
            youngest.free()
            self._waiting.appendleft(youngest)
            if youngest is request:
                return False
        request.sequence.grow(number)
        return True


def require_room(request: Request, num_pages: int, could_be_fp8: bool) -> None:
    """Raises GenerationError if the longest text that a request may become does not fit in this many pages."""
    if request.finish_reason is None and pages_of(request.most_tokens) > num_pages:
        fp8 = "keep the cache in FP8, " if could_be_fp8 else ""
        raise GenerationError(
            f"{request.name} is {request.num_prompt:,} tokens long, and the cache needs room for "
            f"{request.most_tokens:,} with its new tokens, found room for {num_pages * PAGE:,}; "
            f"shorten it, lower max_new_tokens, {fp8}or take a device with more memory"
        )


def _num_pages(request: Request) -> int:
    return 0 if request.sequence is None else len(request.sequence.pages)

"""The generation engine with speculative decoding (DeepSeek-V3 report, §2.2 and §5.4.3).

A step computes the last known token of a request together with the drafts of the tokens after it, accepts some of
them, and drafts the next ones with the first MTP layer. Row i of that layer takes the state of the main model at
position i and token i + 1. It lies beside the main rows of position i in the cache, so a sequence has equally many
rows in every layer between two steps; the rows of rejected drafts are dropped. A second draft comes from the same
layer, applied to its own state and the first draft; the next step overwrites its row.

Axes: B batch, N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_v3.inference.engine.drafts import Acceptance, choose_drafts, choose_verified
from deepseek_v3.inference.engine.engine import Chosen, Engine, Forward, add_token, copy_to_host
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.inference.engine.sampler import index_of
from deepseek_v3.inference.engine.scheduler import Scheduler
from deepseek_v3.mla.cached_sequences import CachedSequence


class DraftingForward(Forward, Protocol):
    """The forward pass of a model and of its first MTP layer; sequences may have room behind their new tokens."""

    def states(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """The states of the tokens of each chunk, (N, D)."""
        ...

    def draft_states(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor]) -> list[Tensor]:
        """The MTP layer's states (N, D) at the positions of each chunk.

        The ids of a chunk are the tokens after its positions; `hidden` are states (N, D) at its positions.
        """
        ...


class _Computed(NamedTuple):
    """A chunk of a request, which may end in drafts, and the main model's states of its tokens, (N, D)."""

    request: Request
    sequence: CachedSequence
    chunk: Chunk
    states_ND: Tensor


class SpeculativeEngine(Engine):
    """Runs requests as `Engine` does, with `speculate` drafts per step. The host reads every step at once.

    `acceptance` counts what becomes of the drafts.
    """

    def __init__(
        self,
        forward: DraftingForward,
        scheduler: Scheduler,
        device: torch.device,
        num_ids: int,
        speculate: int,
        acceptance: Acceptance,
    ) -> None:
        super().__init__(forward, scheduler, device, num_ids, reads_late=False)
        self._drafting, self._speculate, self._acceptance = forward, speculate, acceptance

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Computes one step; returns the requests that got tokens or finished."""
        plan = self._scheduler.plan()
        work = [(request, _with_drafts(request)) for request in plan.decoding] + plan.prefilling
        if not work:
            return []
        states = self._drafting.states([chunk for _, chunk in work])
        computed = [
            _Computed(request, chunk.sequence, chunk, states_ND)
            for (request, chunk), states_ND in zip(work, states, strict=True)
        ]
        complete = [each for each in computed if each.chunk.end >= len(each.request.ids)]
        if complete:
            self._verify(complete)
        running = [each for each in computed if each.request.finish_reason is None]
        if running:
            self._draft(running, [each for each in complete if each.request.finish_reason is None])
        self._scheduler.drop_finished()
        return [each.request for each in complete]

    def _verify(self, complete: Sequence[_Computed]) -> None:
        """Gives each request the tokens that its drafts agree with, and the one after them."""
        judged = [each.states_ND[-1 - len(each.request.drafts) :] for each in complete]
        logits_NV = self._drafting.logits(torch.cat(judged))[:, : self._num_ids]
        requests = [each.request for each in complete]
        chosen = copy_to_host(choose_verified(logits_NV, requests)).read()
        first = 0
        for request in requests:
            end = first + len(request.drafts) + 1
            self._take(request, chosen, range(first, end))
            first = end

    def _take(self, request: Request, chosen: Chosen, rows: range) -> None:
        """Adds the tokens of a request's rows up to the first one that is no accepted draft or ends the text."""
        known, drafts, request.drafts = len(request.ids), request.drafts, []
        accepted = 0
        for place, row in enumerate(rows):
            add_token(request, chosen, row)
            agrees = place < len(drafts) and chosen.tokens[row] == drafts[place].token
            accepted += agrees
            if not agrees or request.finish_reason is not None:
                break
        new = request.ids[known:]
        if request.seen_V is not None and new:
            request.seen_V[index_of(new, request.seen_V)] = True
        if known > request.num_prompt:
            self._acceptance.tokens += len(new)
            self._acceptance.steps += 1
            is_cut = accepted == len(new) < len(drafts)  # the text ended inside the accepted drafts
            self._acceptance.count(accepted if is_cut else len(drafts), accepted)

    def _draft(self, running: Sequence[_Computed], complete: Sequence[_Computed]) -> None:
        """Computes the MTP layer's rows of all known tokens, and drafts the next tokens of complete requests."""
        spans = [(each, span) for each in running for span in _spans(each)]
        hidden = [
            each.states_ND[span.start - each.chunk.start : span.end - each.chunk.start] for each, span in spans
        ]
        states = self._drafting.draft_states([span for _, span in spans], hidden) if spans else []
        last = {id(each): states_ND[-1] for (each, _), states_ND in zip(spans, states, strict=True)}
        self._add_drafts(complete, [last[id(each)] for each in complete])
        for request, sequence, _, _ in complete:
            sequence.truncate(sequence.length - (len(request.ids) - 1))

    def _add_drafts(self, complete: Sequence[_Computed], states: Sequence[Tensor]) -> None:
        """Drafts up to `speculate` tokens of each request from the MTP layer's state at its last row."""
        left = list(zip(complete, states, strict=True))
        for depth in range(self._speculate):
            # The step that judges the drafts adds one token more than it accepts.
            left = [(each, state_D) for each, state_D in left if _room(each.request) > depth + 1]
            if not left:
                return
            if depth:
                chunks = [
                    Chunk(each.sequence, len(each.request.ids) + depth - 2, [each.request.drafts[-1].token], False)
                    for each, _ in left
                ]
                hidden = [state_D[None] for _, state_D in left]
                states = [state_1D[0] for state_1D in self._drafting.draft_states(chunks, hidden)]
                left = [(each, state_D) for (each, _), state_D in zip(left, states, strict=True)]
            logits_BV = self._drafting.logits(torch.stack([state_D for _, state_D in left]))[:, : self._num_ids]
            requests = [each.request for each, _ in left]
            for request, draft in zip(requests, choose_drafts(logits_BV, requests), strict=True):
                request.drafts.append(draft)


def _with_drafts(request: Request) -> Chunk:
    """The last known token of a request and its drafts."""
    assert request.sequence is not None
    ids = [request.ids[-1], *(draft.token for draft in request.drafts)]
    return Chunk(request.sequence, len(request.ids) - 1, ids, is_prompt=False)


def _room(request: Request) -> int:
    """How many tokens may still be added to a request."""
    return request.most_tokens - len(request.ids)


def _spans(computed: _Computed) -> Iterator[Chunk]:
    """The rows of the MTP layer that a chunk and the known tokens determine, with the tokens after their positions.

    The last row of a prompt waits for the first generated token, and is computed as a generated token always.
    """
    request, sequence, chunk, _ = computed
    end = min(chunk.end, len(request.ids) - 1)
    border = min(end, max(chunk.start, request.num_prompt - 1))
    for start, stop, is_prompt in ((chunk.start, border, True), (border, end, False)):
        if start < stop:
            yield Chunk(sequence, start, request.ids[start + 1 : stop + 1], is_prompt)

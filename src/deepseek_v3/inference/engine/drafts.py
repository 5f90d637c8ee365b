"""Drafts of the next tokens of a text, and which of them the model accepts (speculative decoding).

A draft is accepted or replaced so that texts have exactly the distribution of texts without drafts: greedy texts
are the same token for token, sampled ones follow by rejection sampling (Leviathan et al. 2023, arXiv:2211.17192,
algorithm 1; Chen et al. 2023, arXiv:2302.01318) from the adjusted distributions of the request.

Axes: B batch, N rows: of each request one for each draft and one more, X the rows that have a draft, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek_v3.inference.engine.generation_request import Draft, Request
from deepseek_v3.inference.engine.sampler import (
    Choice,
    chosen_by_kind,
    finite_logits,
    index_of,
    kinds_of,
    logprobs_of,
    with_penalties,
)
from deepseek_v3.inference.sampling import drawn, next_token_probabilities, seed_for, uniform_draws

MOST_DRAFTS = 2  # per step


@dataclass
class Acceptance:
    """What became of the drafts.

    `offered` and `accepted` count first drafts, second drafts and so on; a second draft is accepted only if the
    first one is. Drafts behind the end of a text are not counted. `tokens` in `steps`: those after the first token
    of each text; a step of two requests counts twice.
    """

    offered: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    tokens: int = 0
    steps: int = 0

    @property
    def shares(self) -> tuple[float, ...]:
        """The accepted share of first drafts, of second drafts and so on, as far as there were any."""
        pairs = zip(self.accepted, self.offered, strict=True)
        return tuple(accepted / offered for accepted, offered in pairs if offered)

    @property
    def tokens_per_step(self) -> float:
        """The mean number of tokens that a request gets from one step; 1 without drafts."""
        return self.tokens / self.steps if self.steps else 1.0

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """Adds the drafts of a step that were accepted or rejected."""
        for place in range(num_drafts):
            self.offered[place] += 1
            self.accepted[place] += place < num_accepted

    def __str__(self) -> str:
        shares = " and ".join(f"{share:.0%}" for share in self.shares) or "none"
        return f"{self.tokens_per_step:.2f} tokens per step, {shares} of drafts accepted"


def choose_drafts(logits_BV: Tensor, requests: Sequence[Request]) -> list[Draft]:
    """The next draft of each request, behind those that it has, from a row of logits of the MTP layer.

    It comes from the distribution that these logits and the request's sampling make.
    """
    drafted = [[draft.token for draft in request.drafts] for request in requests]
    adjusted_BV = with_penalties(finite_logits(logits_BV)[0], requests, drafted)
    tokens_B = torch.empty(len(requests), dtype=torch.int64, device=logits_BV.device)
    distributions: dict[int, Tensor] = {}
    for rows in kinds_of(requests):
        group = [requests[row] for row in rows]
        rows_B = index_of(rows, logits_BV)
        if group[0].sampling.temperature == 0:
            tokens_B[rows_B] = adjusted_BV[rows_B].argmax(-1)
            continue
        q_BV = next_token_probabilities(adjusted_BV[rows_B], [request.sampling for request in group])
        seeds = [seed_for(request.seed, "draft") for request in group]
        places = [_place(request, len(request.drafts)) for request in group]
        tokens_B[rows_B] = drawn(q_BV, uniform_draws(seeds, places))
        distributions |= dict(zip(rows, q_BV, strict=True))
    return [Draft(token, distributions.get(row)) for row, token in enumerate(tokens_B.tolist())]


def choose_verified(logits_NV: Tensor, requests: Sequence[Request]) -> Choice:
    """The token at the place of each draft and at the place behind the drafts, from the model's logits.

    A request has as many tokens as its drafts agree with, and the one after them; its other rows mean nothing.
    """
    rows = [(request, place) for request in requests for place in range(len(request.drafts) + 1)]
    owners = [request for request, _ in rows]
    logits_NV, finite_N = finite_logits(logits_NV)
    drafted = [[draft.token for draft in request.drafts[:place]] for request, place in rows]
    tokens_N = chosen_by_kind(
        with_penalties(logits_NV, owners, drafted),
        owners,
        lambda rows_NV, numbers: _verified(rows_NV, [rows[number] for number in numbers]),
    )
    return Choice(tokens_N.masked_fill(~finite_N, -1), logprobs_of(logits_NV, tokens_N, owners))


def _verified(logits_NV: Tensor, rows: Sequence[tuple[Request, int]]) -> Tensor:
    """The tokens (N,) of rows of one kind, each the request and its place.

    A draft d, drawn from q, is accepted with probability min(1, p(d)/q(d)), and otherwise replaced by a token drawn
    from max(0, p - q). Behind the drafts a token is drawn from p, with the number that it gets without drafts.
    """
    if rows[0][0].sampling.temperature == 0:
        return logits_NV.argmax(-1)
    p_NV = next_token_probabilities(logits_NV, [request.sampling for request, _ in rows])
    places = [_place(*row) for row in rows]
    draws_N = uniform_draws([request.seed for request, _ in rows], places)
    drafts = {row: request.drafts[at] for row, (request, at) in enumerate(rows) if at < len(request.drafts)}
    if not drafts:
        return drawn(p_NV, draws_N)
    rows_X = index_of(list(drafts), p_NV)
    drafts_X = index_of([draft.token for draft in drafts.values()], p_NV)
    p_XV = p_NV[rows_X]
    q_XV = torch.stack([draft.probabilities_V for draft in drafts.values() if draft.probabilities_V is not None])
    seeds = [seed_for(rows[row][0].seed, "accept") for row in drafts]
    accept_X = uniform_draws(seeds, [places[row] for row in drafts]).to(p_XV.device, non_blocking=True)
    p_X, q_X = (each_XV.gather(1, drafts_X[:, None]).squeeze(1).double() for each_XV in (p_XV, q_XV))
    rest_XV = (p_XV - q_XV).clamp_(min=0)
    rest_XV = torch.where(
        rest_XV.sum(-1, keepdim=True) > 0, rest_XV, p_XV
    )  # nothing is left if p is q, but for rounding
    tokens_N = drawn(p_NV.index_copy(0, rows_X, rest_XV), draws_N)
    return tokens_N.index_copy(0, rows_X, torch.where(accept_X * q_X < p_X, drafts_X, tokens_N[rows_X]))


def _place(request: Request, place: int) -> int:
    """The number, in the generated text, of the token at this place behind the known ones."""
    return request.num_tokens - request.num_prompt + place

"""Chooses the next token of every request of a batch, on the device.

Axes: B batch, V vocabulary, N log-probabilities of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.sampling import penalized, sampled, uniform_draws
from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.ops.few_rows import FEW_ROWS, FewRows
from deepseek_v3.ops.operation import Target


class Choice(NamedTuple):
    """The chosen tokens (B,) int64, -1 for a row whose logits are not finite.

    With `logprobs`, also their log-probabilities (B,), and the most probable ids and their log-probabilities
    (B, N), for the largest N of the batch.
    """

    tokens_B: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None


def choose_tokens(logits_BV: Tensor, requests: Sequence[Request]) -> Choice:
    """Chooses the next token of each request from its row of logits, of any float type.

    Greedy decoding takes the lowest of equally probable ids. A request is treated in the same way in every batch:
    rows that need other operations are computed apart from each other.
    """
    if all(_is_plainly_greedy(request) for request in requests):
        return Choice(_kernels(logits_BV.device).greedy_choice(logits_BV), None)
    logits_BV, finite_B = finite_logits(logits_BV)
    adjusted_BV = with_penalties(logits_BV, requests)
    tokens_B = chosen_by_kind(
        adjusted_BV, requests, lambda rows_BV, rows: _chosen(rows_BV, [requests[row] for row in rows])
    )
    for row, request in enumerate(requests):
        if request.seen_V is not None:
            request.seen_V.scatter_(0, tokens_B[row : row + 1], True)
    return Choice(tokens_B.masked_fill(~finite_B, -1), logprobs_of(logits_BV, tokens_B, requests))


def _is_plainly_greedy(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and sampling.logprobs is None


@cache
def _kernels(device: torch.device) -> FewRows:
    return FEW_ROWS.select(Target(device)).run


def finite_logits(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in float32 or wider, with zeros in rows that are not finite, and which rows are finite, (B,)."""
    finite_B = (logits_BV - logits_BV).sum(-1) == 0  # the difference is NaN for NaN and infinity, and 0 else
    return at_least_float32(logits_BV).masked_fill(~finite_B[:, None], 0), finite_B


def chosen_by_kind(
    logits_BV: Tensor, requests: Sequence[Request], choose: Callable[[Tensor, list[int]], Tensor]
) -> Tensor:
    """The tokens (B,) that `choose` takes from rows of logits, given with their numbers, for each kind of row."""
    groups = kinds_of(requests)
    if len(groups) == 1:
        return choose(logits_BV, groups[0])
    tokens_B = torch.empty(len(requests), dtype=torch.int64, device=logits_BV.device)
    for group in groups:
        rows_B = index_of(group, logits_BV)
        tokens_B[rows_B] = choose(logits_BV[rows_B], group)
    return tokens_B


def kinds_of(requests: Sequence[Request]) -> list[list[int]]:
    """The rows of the batch that are greedy, that sample, and that sample from a part of the tokens."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, request in enumerate(requests):
        greedy = request.sampling.temperature == 0
        kinds.setdefault((greedy, not greedy and request.sampling.is_filtered), []).append(row)
    return list(kinds.values())


def _chosen(logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    if requests[0].sampling.temperature == 0:
        return logits_BV.argmax(-1)
    positions = [request.num_tokens - request.num_prompt for request in requests]
    draws_B = uniform_draws([request.seed for request in requests], positions)
    return sampled(logits_BV, [request.sampling for request in requests], draws_B)


def with_penalties(
    logits_BV: Tensor, requests: Sequence[Request], drafted: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """The logits after the penalties of their requests.

    `drafted`: for each row the tokens that are drafted before it, which count as tokens of the text.
    """
    rows = [row for row, request in enumerate(requests) if request.sampling.repetition_penalty != 1]
    if not rows:
        return logits_BV
    rows_B = index_of(rows, logits_BV)
    seen_BV = torch.stack([_seen(requests[row], logits_BV) for row in rows])
    for place, row in enumerate(rows):
        if drafted is not None and drafted[row]:
            seen_BV[place, index_of(drafted[row], logits_BV)] = True
    penalties = [requests[row].sampling.repetition_penalty for row in rows]
    return logits_BV.index_copy(0, rows_B, penalized(logits_BV[rows_B], seen_BV, penalties))


def _seen(request: Request, logits_BV: Tensor) -> Tensor:
    """Which ids occur in a request, (V,) bool, also those that are pending."""
    if request.seen_V is None:
        seen_V = torch.zeros(logits_BV.shape[-1], dtype=torch.bool)
        seen_V[[token for token in request.ids if token < len(seen_V)]] = True
        request.seen_V = seen_V.to(logits_BV.device, non_blocking=True)
    return request.seen_V


def logprobs_of(
    logits_BV: Tensor, tokens_B: Tensor, requests: Sequence[Request]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `Choice` says of log-probabilities; None if no request asks for them."""
    wanted = [request.sampling.logprobs for request in requests if request.sampling.logprobs is not None]
    if not wanted:
        return None
    logprobs_BV = logits_BV.log_softmax(-1)
    top = logprobs_BV.topk(min(max(wanted), logprobs_BV.shape[-1]), dim=-1)
    return logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1), top.indices, top.values


def index_of(rows: Sequence[int], like: Tensor) -> Tensor:
    """Numbers as an index, (B,) int64, on the device of `like`."""
    return torch.tensor(rows).to(like.device, non_blocking=True)

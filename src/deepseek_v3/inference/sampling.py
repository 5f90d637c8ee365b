"""How the tokens of a request are chosen: its parameters, and the distribution that they make of logits.

Every row of a batch has its own parameters, and its result depends on its own row alone.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import format_value

MOST_LOGPROBS = 100
_PAIR = struct.Struct("<QQ")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when to stop.

    temperature         0 always takes the most probable token, 1 samples the model's own distribution
    top_p               samples from the fewest most probable tokens that hold this share of the probability
    top_k               samples from the `top_k` most probable tokens; None: from all
    repetition_penalty  above 1 makes tokens of the prompt and of the text so far less probable; 1: off
    seed                the same seed gives the same text
    max_new_tokens      the most tokens to add to a prompt
    stop                the text ends before the first of these strings
    min_p               leaves out tokens less probable than this share of the most probable one; 0: none
    stop_tokens         the text ends before the first of these ids, beside those that end every text
    logprobs            states the log-probability of each token, and of this many of the most probable; None: no

    Raises GenerationError for a value out of bounds, and names the field, the value and the bounds. The bounds keep
    every step finite in float32.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        greedy = _is_number(self.temperature, 0, 0)
        self._require("temperature", greedy or _is_number(self.temperature, 1e-6, 1e6), "0, or from 1e-6 to 1e6")
        share = _is_number(self.top_p, 0, 1) and self.top_p > 0
        self._require("top_p", share, "a number above 0 and at most 1")
        self._require("top_k", self.top_k is None or _is_integer(self.top_k, 1), "a whole number from 1, or none")
        self._require("repetition_penalty", _is_number(self.repetition_penalty, 0.01, 100), "from 0.01 to 100")
        self._require("seed", _is_integer(self.seed, 0), "a whole number from 0")
        self._require("max_new_tokens", _is_integer(self.max_new_tokens, 1), "a whole number from 1")
        strings = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        self._require("stop", strings, "texts, none of them empty")
        self._require("min_p", _is_number(self.min_p, 0, 1), "a number from 0 to 1")
        ids = isinstance(self.stop_tokens, tuple) and all(_is_integer(token, 0) for token in self.stop_tokens)
        self._require("stop_tokens", ids, "ids of tokens")
        counted = self.logprobs is None or (_is_integer(self.logprobs, 0) and self.logprobs <= MOST_LOGPROBS)
        self._require("logprobs", counted, f"a whole number from 0 to {MOST_LOGPROBS}, or none")

    @property
    def is_filtered(self) -> bool:
        """Whether improbable tokens are left out before sampling."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    def _require(self, field: str, allowed: bool, expected: str) -> None:
        if not allowed:
            raise GenerationError(f"{field} = {format_value(getattr(self, field))}: expected {expected}")


def request_seed(seed: int, index: int) -> int:
    """The seed, of 64 bits, of the request with this number among those that share a seed."""
    return _hash64(f"{seed}:{index}".encode())


def seed_for(seed: int, purpose: str) -> int:
    """The seed, of 64 bits, of the numbers that a request draws for another purpose than choosing its tokens."""
    return _hash64(f"{seed}:{purpose}".encode())


def uniform_draws(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """A number from 0 to below 1 for each pair of a request's seed and a position in it; float64 (B,).

    It is a hash of the two, so it depends neither on a batch nor on the numbers drawn before.
    """
    hashes = [_hash64(_PAIR.pack(*pair)) for pair in zip(seeds, positions, strict=True)]
    return torch.tensor([(number >> 11) * 2.0**-53 for number in hashes], dtype=torch.float64)


def penalized(logits_BV: Tensor, seen_BV: Tensor, penalties: Sequence[float]) -> Tensor:
    """Divides the logits of seen tokens by the penalty of their row (CTRL, arXiv:1909.05858, §4.1).

    A negative logit is multiplied instead, because dividing would make its token more probable.
    """
    penalty_B1 = _column(penalties, logits_BV)
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def sampled(logits_BV: Tensor, samplings: Sequence[SamplingConfig], draws_B: Tensor) -> Tensor:
    """The token of each row, (B,) int64, for temperatures above 0, all filtered or none."""
    return drawn(next_token_probabilities(logits_BV, samplings), draws_B)


def drawn(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The token of each row, (B,) int64, with probabilities in proportion to `weights_BV` and a draw of each row.

    Inverts the cumulative distribution at the drawn number, in the order of the ids: in the order of probability, a
    rounding error that swaps two almost equal tokens would change the result.
    """
    cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    targets_B1 = draws_B.to(cumulative_BV.device, non_blocking=True)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)


def next_token_probabilities(logits_BV: Tensor, samplings: Sequence[SamplingConfig]) -> Tensor:
    """The distributions that are sampled, (B, V) float32 (float64 for float64), for temperatures above 0.

    Applies, in this order: temperature, the `top_k` most probable tokens, the nucleus of their distribution, which
    is the fewest most probable tokens that hold at least `top_p` (arXiv:1904.09751, §3.1), and `min_p`
    (arXiv:2407.01082). Of equally probable tokens at a limit the lowest ids are kept.
    """
    logits_BV = at_least_float32(logits_BV)
    scaled_BV = logits_BV / _column([each.temperature for each in samplings], logits_BV)
    if not any(each.is_filtered for each in samplings):
        return scaled_BV.softmax(-1)
    sorted_BV, ids_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    if any(each.top_k is not None for each in samplings):
        ranks_V = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
        most_B1 = _column([each.top_k or sorted_BV.shape[-1] for each in samplings], ranks_V)
        sorted_BV = sorted_BV.masked_fill(ranks_V >= most_B1, float("-inf"))
    whole_BV = kept_BV = sorted_BV.softmax(-1)
    if any(each.top_p < 1 for each in samplings):
        more_probable_BV = whole_BV.cumsum(-1, dtype=torch.float64) - whole_BV
        shares = [each.top_p if each.top_p < 1 else float("inf") for each in samplings]
        kept_BV = kept_BV.masked_fill(more_probable_BV >= _column(shares, more_probable_BV), 0)
    if any(each.min_p > 0 for each in samplings):
        least_B1 = _column([each.min_p for each in samplings], whole_BV) * whole_BV[:, :1]
        kept_BV = kept_BV.masked_fill(whole_BV < least_B1, 0)
    kept_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return torch.zeros_like(kept_BV).scatter(-1, ids_BV, kept_BV)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number for each row, (B, 1), in the type and on the device of `like`."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)[:, None]


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

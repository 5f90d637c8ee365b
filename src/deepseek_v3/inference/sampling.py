"""Sampling the next token from a model's logits.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import format_value


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

    def _require(self, field: str, allowed: bool, expected: str) -> None:
        if not allowed:
            raise GenerationError(f"{field} = {format_value(getattr(self, field))}: expected {expected}")


def row_generator(seed: int, index: int) -> np.random.Generator:
    """The random number generator of prompt number `index`, which does not depend on its batch."""
    return np.random.default_rng((seed, index))


def choose_next(
    logits_BV: Tensor, seen_BV: Tensor, sampling: SamplingConfig, generators: Sequence[np.random.Generator]
) -> Tensor:
    """The next token of each row, (B,) int64.

    `logits_BV` has any float type; `seen_BV` bool marks the tokens of the prompt and of the text so far. Greedy
    decoding takes the lowest of equally probable ids. Sampling draws one number from each row's generator and
    inverts the cumulative distribution in the order of the ids: in the order of probability, a rounding error that
    swaps two almost equal tokens would change the result.

    Raises GenerationError if logits are NaN or infinite.
    """
    if sampling.temperature == 0:
        return _penalized(logits_BV, seen_BV, sampling.repetition_penalty).argmax(-1)
    probabilities_BV = next_token_probabilities(logits_BV, seen_BV, sampling)
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    draws_B = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    targets_B1 = draws_B.to(cumulative_BV.device)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)


def next_token_probabilities(logits_BV: Tensor, seen_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution that `choose_next` samples, (B, V) float32 (float64 for float64), for temperature > 0.

    Applies, in this order: repetition penalty, temperature, the `top_k` most probable tokens, and the nucleus of
    their distribution, the fewest most probable tokens that hold at least `top_p` (arXiv:1904.09751, §3.1). Of
    equally probable tokens at a limit the lowest ids are kept.
    """
    logits_BV = _penalized(logits_BV, seen_BV, sampling.repetition_penalty) / sampling.temperature
    sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_BV[:, sampling.top_k :] = float("-inf")
    kept_BV = sorted_BV.softmax(-1)
    if sampling.top_p < 1:
        more_probable_BV = kept_BV.cumsum(-1, dtype=torch.float64) - kept_BV
        kept_BV = kept_BV.masked_fill(more_probable_BV >= sampling.top_p, 0)
    kept_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return torch.zeros_like(kept_BV).scatter(-1, ids_BV, kept_BV)


def _penalized(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divides the logits of seen tokens by the penalty (CTRL, arXiv:1909.05858, §4.1).

    A negative logit is multiplied instead, because dividing would make its token more probable.
    """
    if not logits_BV.isfinite().all():
        raise GenerationError(
            "the model's logits are NaN or infinite: its weights are damaged, or its training diverged; "
            "use an earlier checkpoint"
        )
    logits_BV = at_least_float32(logits_BV)
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

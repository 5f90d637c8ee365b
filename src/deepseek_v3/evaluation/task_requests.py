"""What lm-evaluation-harness asks of a model, as windows to score and prompts to continue; needs no lm-eval itself.

The rules are those of the harness's own `hf` model, so that both give the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.scoring import Window, rolling_windows
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import format_value

DEFAULT_NEW_TOKENS = 256  # of a task that names no limit
# Names of the limit in `generation_kwargs`; the first one that is given counts.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Options of other engines, and the values with which they change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {"num_beams": (1,), "num_return_sequences": (1,), "use_cache": (True,)}


@dataclass(frozen=True)
class TaskEncoder:
    """Encodes texts of tasks. A text starts with the markers that the tokenizer puts before prompts, if any."""

    tokenizer: Tokenizer
    context: int

    def prompt(self, text: str) -> list[int]:
        """The ids of a text with those markers."""
        return [*self.tokenizer.prompt_start, *self.tokenizer.encode(text)]

    def text_windows(self, text: str) -> list[Window]:
        """The windows that score a whole text once; none for an empty one."""
        ids = np.array(self.prompt(text), np.int64)
        return list(rolling_windows(ids, self.tokenizer.text_start, self.context))

    def pair_windows(self, before: Sequence[int], targets: Sequence[int]) -> list[Window]:
        """The windows that score `targets` after `before`, as `pair` returns them.

        It is one, if there are targets and they fit the model's context; what is before them may lose its start.
        """
        if len(targets) > self.context:
            return list(rolling_windows(np.array(targets, np.int64), before[-1], self.context))
        inputs = [*before, *targets][-(self.context + 1) :][:-1]
        return [Window(np.array(inputs, np.int64), np.array(targets, np.int64))] if targets else []

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation.

        Both are encoded as one text, and cut after as many ids as the context alone has without the spaces at its
        end. None may be left for the continuation, if a token spans the boundary. An empty context is the token
        that begins a text.
        """
        if not context:
            start, ids = self.tokenizer.text_start, self.tokenizer.encode(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
        whole, before = self.prompt(context + continuation), self.prompt(context.rstrip())
        return before or [self.tokenizer.text_start], whole[len(before) :]


@dataclass(frozen=True)
class TaskSampling:
    """How a task wants text: the sampling, and the strings before which the text ends."""

    sampling: SamplingConfig
    until: tuple[str, ...]

    @classmethod
    def from_options(cls, options: Mapping[str, Any], context: int, end_of_text: str = "") -> TaskSampling:
        """Reads the `generation_kwargs` of a task. The name of the end-of-text marker, too, ends the text.

        Without `do_sample`, a temperature above 0 samples; with it and without a temperature, that is 1. Raises
        GenerationError for an option that is unknown or out of bounds, and if no room is left for a prompt.
        """
        given = {key: value for key, value in options.items() if value is not None}
        limits = [given.pop(name) for name in _LIMITS if name in given]
        limit = _number(int, _LIMITS[0], limits[0] if limits else DEFAULT_NEW_TOKENS)
        if limit >= context:
            raise GenerationError(
                f"the task asks for {limit:,} new tokens, and the model's context of {context:,} has no room for a "
                "prompt beside them; set a smaller max_gen_toks in the task's generation_kwargs"
            )
        until = given.pop("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
            raise GenerationError(f"until = {format_value(until)}: expected a text or a list of texts")
        until = tuple(text for text in dict.fromkeys((*until, end_of_text)) if text)
        return cls(SamplingConfig(max_new_tokens=limit, stop=until, **_sampling_options(given)), until)

    def cut(self, text: str) -> str:
        """The text before the first string of `until`, as the harness cuts it."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text


def _sampling_options(given: dict[str, Any]) -> dict[str, Any]:
    temperature = _number(float, "temperature", given.pop("temperature", None))
    samples = given.pop("do_sample", None)
    if samples is None:
        samples = bool(temperature)
    chosen: dict[str, Any] = {"temperature": (1.0 if temperature is None else temperature) if samples else 0.0}
    chosen["top_p"] = _number(float, "top_p", given.pop("top_p", 1.0))
    chosen["top_k"] = _number(int, "top_k", given.pop("top_k", None)) or None
    chosen["repetition_penalty"] = _number(float, "repetition_penalty", given.pop("repetition_penalty", 1.0))
    for name, value in given.items():
        if value not in _NEUTRAL.get(name, ()):
            raise GenerationError(
                f"generation_kwargs: {name} = {format_value(value)} is not supported, expected until, do_sample, "
                f"temperature, top_p, top_k, repetition_penalty and {_LIMITS[0]}; remove it from the task"
            )
    return chosen


def _number(kind: type[int] | type[float], name: str, value: Any) -> Any:
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError):
        raise GenerationError(f"{name} = {format_value(value)}: expected a number") from None

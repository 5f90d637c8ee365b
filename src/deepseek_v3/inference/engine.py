"""Generates text that continues prompts, in batches or as a stream.

Axes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepseek_v3.data.tokens.stream_decoder import StreamDecoder
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.sampling import SamplingConfig, choose_next, row_generator
from deepseek_v3.mla.kv_compression import LatentCache
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import GenerationError

FinishReason = Literal["stop", "end_of_text", "length", "context"]


@dataclass(frozen=True)
class Completion:
    """The generated continuation of a prompt.

    `tokens` are all generated ids. `text` is their text, starting with a space if the first word follows one; it
    ends before a stop string and without the end-of-text marker. `finish_reason`: "stop" after a stop string,
    "end_of_text" after a token that ends texts, "length" after `max_new_tokens`, "context" when prompt and tokens
    fill the model's context.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason


class _Text:
    """The text of a completion, built token by token. `shown` never holds a stop string or the start of one.

    `prompt` are the ids that the text continues.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], prompt: abc.Sequence[int] = ()) -> None:
        self.shown = ""
        self._held = ""  # the end of the text that may be the start of a stop string
        self._stop = stop
        self._decoder = StreamDecoder(tokenizer, prompt)

    def push(self, token: int) -> bool:
        """Adds the next token; returns True if it completes a stop string, which ends the text."""
        return self._ends_with(self._decoder.push(token))

    def end(self) -> bool:
        """Adds the text that was held back for an unfinished character or stop string to `shown`.

        Returns True if that text completes a stop string, which ends the text before it.
        """
        stopped = self._ends_with(self._decoder.flush())
        if not stopped:
            self.shown += self._held
        return stopped

    def _ends_with(self, new: str) -> bool:
        """Adds text up to the first completed stop string; the result does not depend on the parts' borders."""
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.shown += self._held[: min(found)[1]]
            return True
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        num_held = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        num_shown = len(self._held) - num_held
        self.shown += self._held[:num_shown]
        self._held = self._held[num_shown:]
        return False


@dataclass
class _Row:
    """A prompt that is being continued; `ids` are the ids of the prompt and then the generated ones."""

    prompt: str
    ids: list[int]
    num_prompt_ids: int
    text: _Text
    generator: np.random.Generator
    finish_reason: FinishReason | None = None

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if reason != "stop" and self.text.end():
            self.finish_reason = "stop"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self.prompt, self.text.shown, tuple(self.ids[self.num_prompt_ids :]), self.finish_reason)


class Generator:
    """Generates the continuations of prompts, at most `batch_size` at a time.

    A prompt starts with the marker that its tokenizer puts before texts, if there is one. A prompt without any
    token starts from the end-of-text marker, which separates the documents of a training corpus. Each prompt has
    its own random number generator, so its text does not depend on the other prompts of the batch.
    Only ids that the tokenizer has are generated, or with `all_ids` any id of the model, as other engines do; ids
    that the tokenizer lacks have no text.

    Raises GenerationError if the tokenizer has more ids than the model.
    """

    def __init__(
        self, model: DeepSeekV3, tokenizer: Tokenizer, batch_size: int = 32, all_ids: bool = False
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise GenerationError(
                f"the tokenizer has {tokenizer.vocab_size} ids, expected at most the model's vocab_size = "
                f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._num_ids = model.config.vocab_size if all_ids else tokenizer.vocab_size
        self._context = model.config.max_position_embeddings
        self._device = model.head_weight_VD.device

    def generate(
        self, prompts: abc.Sequence[str], sampling: SamplingConfig, use_cache: bool = True
    ) -> list[Completion]:
        """Continues every prompt; the completions have the order of the prompts.

        Without the cache each step runs the model on the whole text again; the result is the same up to rounding.
        Raises GenerationError for a prompt longer than the model's context and for logits that are not finite, and
        DataError for a prompt that is not Unicode.
        """
        rows = [self._start(prompt, index, sampling) for index, prompt in enumerate(prompts)]
        return self._complete(rows, sampling, use_cache)

    def continue_tokens(
        self, prompts: abc.Sequence[abc.Sequence[int]], sampling: SamplingConfig, use_cache: bool = True
    ) -> list[Completion]:
        """Continues prompts of one or more ids as `generate` continues texts, and adds no marker to them."""
        rows = [
            self._row(self._tokenizer.decode(ids), ids, ids, index, sampling) for index, ids in enumerate(prompts)
        ]
        return self._complete(rows, sampling, use_cache)

    def _complete(self, rows: list[_Row], sampling: SamplingConfig, use_cache: bool) -> list[Completion]:
        for first in range(0, len(rows), self._batch_size):
            for _ in self._steps(rows[first : first + self._batch_size], sampling, use_cache):
                pass
        return [row.completion() for row in rows]

    def stream(
        self, prompt: str, sampling: SamplingConfig, use_cache: bool = True
    ) -> abc.Generator[str, None, Completion]:
        """Yields the text that `generate` returns for a single prompt, in parts as soon as they are final.

        A part never ends inside a character and holds no part of a stop string. The generator's return value is the
        completion. This call itself, not the first iteration, raises the errors of `generate` for the prompt.
        """
        return self._stream_text(self._start(prompt, 0, sampling), sampling, use_cache)

    def _stream_text(
        self, row: _Row, sampling: SamplingConfig, use_cache: bool
    ) -> abc.Generator[str, None, Completion]:
        num_yielded = 0
        for _ in self._steps([row], sampling, use_cache):
            if new := row.text.shown[num_yielded:]:
                num_yielded += len(new)
                yield new
        return row.completion()

    def _start(self, prompt: str, index: int, sampling: SamplingConfig) -> _Row:
        encoded = self._tokenizer.encode(prompt)
        ids = [*self._tokenizer.prompt_start, *encoded] or [self._tokenizer.end_of_text]
        return self._row(prompt, ids, encoded, index, sampling)

    def _row(
        self, prompt: str, ids: abc.Sequence[int], shown: abc.Sequence[int], index: int, sampling: SamplingConfig
    ) -> _Row:
        """A row that continues `ids`; `shown` are those of them whose text the new text continues."""
        if len(ids) > self._context:
            raise GenerationError(
                f"prompt {index + 1} is {len(ids)} tokens long, expected at most the model's context of "
                f"{self._context} (max_position_embeddings); shorten it"
            )
        text = _Text(self._tokenizer, sampling.stop, shown)
        row = _Row(prompt, [*ids], len(ids), text, row_generator(sampling.seed, index))
        if len(ids) == self._context:
            row.finish("context")
        return row

    def _steps(self, rows: list[_Row], sampling: SamplingConfig, use_cache: bool) -> abc.Iterator[None]:
        """Adds one token to every unfinished row per iteration, until all rows are finished."""
        rows = [row for row in rows if row.finish_reason is None]
        cache = self._new_cache(rows, sampling) if use_cache and rows else None
        seen_BV = self._seen(rows)
        while rows:
            tokens_B = choose_next(
                self._next_logits(rows, cache), seen_BV, sampling, [row.generator for row in rows]
            )
            seen_BV.scatter_(1, tokens_B[:, None], True)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                self._take(row, token, sampling)
            unfinished = [index for index, row in enumerate(rows) if row.finish_reason is None]
            if len(unfinished) < len(rows):
                rows, seen_BV = [rows[index] for index in unfinished], seen_BV[unfinished]
                if cache is not None:
                    _keep_rows(cache, unfinished)
            yield

    @torch.inference_mode()
    def _next_logits(self, rows: list[_Row], cache: LatentCache | None) -> Tensor:
        """Runs the model on the tokens that are not in the cache; logits (B, V) of the token after each row.

        Rows are padded on the right. The causal mask hides the padding from all tokens, and the next tokens
        overwrite it in the cache, because the cache counts each row's own tokens only.
        """
        whole = cache is None or cache.is_empty
        new = [torch.tensor(row.ids if whole else row.ids[-1:]) for row in rows]
        lengths_B = torch.tensor([len(ids) for ids in new], device=self._device)
        tokens_BS = pad_sequence(new, batch_first=True, padding_value=self._tokenizer.end_of_text)
        hidden_BSD = self._model.final_states(tokens_BS.to(self._device), cache)
        if cache is not None:
            cache.advance(lengths_B)
        rows_B = torch.arange(len(rows), device=self._device)
        return self._model.logits(hidden_BSD[rows_B, lengths_B - 1])[:, : self._num_ids]

    def _seen(self, rows: list[_Row]) -> Tensor:
        """Which ids occur in each row, (B, V) bool."""
        seen_BV = torch.zeros(len(rows), self._num_ids, dtype=torch.bool)
        for seen_V, row in zip(seen_BV, rows, strict=True):
            seen_V[row.ids] = True
        return seen_BV.to(self._device)

    def _take(self, row: _Row, token: int, sampling: SamplingConfig) -> None:
        row.ids.append(token)
        if token in self._tokenizer.ends:
            row.finish("end_of_text")
        elif row.text.push(token):
            row.finish("stop")
        elif len(row.ids) - row.num_prompt_ids == sampling.max_new_tokens:
            row.finish("length")
        elif len(row.ids) == self._context:
            row.finish("context")

    def _new_cache(self, rows: list[_Row], sampling: SamplingConfig) -> LatentCache:
        longest = max(len(row.ids) for row in rows)
        capacity = min(longest + sampling.max_new_tokens, self._context)
        dtype = self._model.compute_dtype or self._model.model.embed_tokens.weight.dtype
        return LatentCache(self._model.config, len(rows), capacity, dtype, self._device)


def _keep_rows(cache: LatentCache, indices: list[int]) -> None:
    """Keeps the cached rows of the sequences at these indices of the batch, and drops all others."""
    indices_B = torch.tensor(indices, dtype=torch.int64, device=cache.lengths_B.device)
    cache.rows_BTL = [rows_BTL[indices_B] for rows_BTL in cache.rows_BTL]
    cache.lengths_B = cache.lengths_B[indices_B]

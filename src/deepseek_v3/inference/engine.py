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
from deepseek_v3.inference.kv_cache import KvCache
from deepseek_v3.inference.sampling import SamplingConfig, choose_next, row_generator
from deepseek_v3.mla.cached_sequences import CachedSequence, extend
from deepseek_v3.mla.kv_compression import KvFormat, pages_of
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.errors import GenerationError

PREFILL_TOKENS = 8192  # of one forward pass; longer prompts are processed in chunks
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
    """A prompt that is being continued; `ids` are the ids of the prompt and then the generated ones.

    `cached`: which of them are in the cache; None without a cache.
    """

    prompt: str
    ids: list[int]
    num_prompt_ids: int
    text: _Text
    generator: np.random.Generator
    finish_reason: FinishReason | None = None
    cached: CachedSequence | None = None

    @property
    def num_new(self) -> int:
        """How many of the ids are not in the cache."""
        return len(self.ids) - (0 if self.cached is None else self.cached.length)

    def next_chunk(self) -> list[int]:
        """The next ids that are not in the cache; without a cache all ids."""
        if self.cached is None:
            return self.ids
        return self.ids[self.cached.length : self.cached.length + PREFILL_TOKENS]

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if reason != "stop" and self.text.end():
            self.finish_reason = "stop"

    def free_if_finished(self) -> None:
        """Gives the pages of a finished row back, and lets go of their pool."""
        if self.finish_reason is not None and self.cached is not None:
            self.cached.free()
            self.cached = None

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self.prompt, self.text.shown, tuple(self.ids[self.num_prompt_ids :]), self.finish_reason)


class Generator:
    """Generates the continuations of prompts, at most `batch_size` at a time.

    A prompt starts with the marker that its tokenizer puts before texts, if there is one. A prompt without any
    token starts from the end-of-text marker, which separates the documents of a training corpus. Each prompt has
    its own random number generator, so its text does not depend on the other prompts of the batch.
    Only ids that the tokenizer has are generated, or with `all_ids` any id of the model, as other engines do; ids
    that the tokenizer lacks have no text. If the cache of `batch_size` prompts does not fit in the memory of the
    device, fewer run at a time. `kv` is the format of the cache; None follows the model's config.

    Raises GenerationError if the tokenizer has more ids than the model, and ConfigError for a cache in FP8 of a
    model whose kv_lora_rank is not a multiple of 128.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        tokenizer: Tokenizer,
        batch_size: int = 32,
        all_ids: bool = False,
        kv: KvFormat | None = None,
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
        self._kv_cache = KvCache(model, kv)

    def generate(
        self, prompts: abc.Sequence[str], sampling: SamplingConfig, use_cache: bool = True
    ) -> list[Completion]:
        """Continues every prompt; the completions have the order of the prompts.

        Without the cache each step runs the model on the whole text again; the result is the same up to rounding.
        Raises GenerationError for a prompt longer than the model's context, for one that does not fit in the memory
        of the device with its new tokens, and for logits that are not finite, and DataError for a prompt that is
        not Unicode.
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
        for batch in self._batches(rows, sampling, use_cache):
            for _ in self._steps(batch, sampling, use_cache):
                pass
        return [row.completion() for row in rows]

    def _batches(self, rows: list[_Row], sampling: SamplingConfig, use_cache: bool) -> list[list[_Row]]:
        """The rows, in order, in batches of at most `batch_size` whose longest texts fit in the cache together."""
        fitting = self._kv_cache.pages_that_fit() if use_cache and rows else 0
        batches: list[list[_Row]] = []
        num_pages = 0
        for index, row in enumerate(rows):
            needed = self._most_pages(row, sampling) if use_cache else 0
            if needed > fitting:
                fp8 = "keep the cache in FP8, " if self._kv_cache.layout.could_be_fp8 else ""
                raise GenerationError(
                    f"prompt {index + 1} is {len(row.ids):,} tokens long, and the cache needs room for "
                    f"{self._most_tokens(row, sampling):,} with its new tokens, found room for {fitting * PAGE:,}; "
                    f"shorten it, lower max_new_tokens, {fp8}or take a device with more memory"
                )
            if not batches or len(batches[-1]) == self._batch_size or num_pages + needed > fitting:
                batches.append([])
                num_pages = 0
            batches[-1].append(row)
            num_pages += needed
        return batches

    def _most_tokens(self, row: _Row, sampling: SamplingConfig) -> int:
        """The length of the longest text that a row may become."""
        return min(row.num_prompt_ids + sampling.max_new_tokens, self._context)

    def _most_pages(self, row: _Row, sampling: SamplingConfig) -> int:
        return 0 if row.finish_reason else pages_of(self._most_tokens(row, sampling))

    def stream(
        self, prompt: str, sampling: SamplingConfig, use_cache: bool = True
    ) -> abc.Generator[str, None, Completion]:
        """Yields the text that `generate` returns for a single prompt, in parts as soon as they are final.

        A part never ends inside a character and holds no part of a stop string. The generator's return value is the
        completion. This call itself, not the first iteration, raises the errors of `generate` for the prompt.
        """
        row = self._start(prompt, 0, sampling)
        self._batches([row], sampling, use_cache)  # raises its error
        return self._stream_text(row, sampling, use_cache)

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
        if use_cache and rows:
            pool = self._kv_cache.new_pool(sum(self._most_pages(row, sampling) for row in rows))
            for row in rows:
                row.cached = CachedSequence(pool)
        seen_BV = self._seen(rows)
        while rows:
            logits_BV = self._next_logits(rows)
            tokens_B = choose_next(logits_BV, seen_BV, sampling, [row.generator for row in rows])
            seen_BV.scatter_(1, tokens_B[:, None], True)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                self._take(row, token, sampling)
            unfinished = [index for index, row in enumerate(rows) if row.finish_reason is None]
            if len(unfinished) < len(rows):
                for row in rows:
                    row.free_if_finished()
                rows, seen_BV = [rows[index] for index in unfinished], seen_BV[unfinished]
            yield

    @torch.inference_mode()
    def _next_logits(self, rows: list[_Row]) -> Tensor:
        """Runs the model on the tokens that are not in the cache; logits (B, V) of the token after each row."""
        longest = max(row.num_new for row in rows)
        together = max(1, PREFILL_TOKENS // longest)
        groups = [rows[first : first + together] for first in range(0, len(rows), together)]
        last_BD = torch.cat([self._last_states(group) for group in groups])
        return self._model.logits(last_BD)[:, : self._num_ids]

    def _last_states(self, rows: list[_Row]) -> Tensor:
        """The state of each row's last token, (B, D); with a cache, long rows are processed in chunks.

        Rows are padded on the right. The causal mask hides the padding from all tokens, and the cache does not
        store it.
        """
        states: list[Tensor | None] = [None] * len(rows)
        while pending := [index for index, state in enumerate(states) if state is None]:
            chunks = [rows[index].next_chunk() for index in pending]
            lengths = [len(chunk) for chunk in chunks]
            tokens_BS = pad_sequence(
                [torch.tensor(chunk) for chunk in chunks],
                batch_first=True,
                padding_value=self._tokenizer.end_of_text,
            )
            sequences = [cached for index in pending if (cached := rows[index].cached) is not None]
            cache = extend(sequences, lengths) if sequences else None
            hidden_BSD = self._model.final_states(tokens_BS.to(self._device), cache)
            for index, hidden_SD, length in zip(pending, hidden_BSD, lengths, strict=True):
                if rows[index].num_new == 0 or cache is None:
                    states[index] = hidden_SD[length - 1]
        return torch.stack([state for state in states if state is not None])

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

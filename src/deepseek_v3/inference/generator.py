"""Generates text that continues prompts, in batches or as a stream.

Axes: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.engine.cpu_forward import CpuForward
from deepseek_v3.inference.engine.device_forward import PREFILL_TOKENS, DeviceForward
from deepseek_v3.inference.engine.device_rows import MOST_ROWS, runs_by_rows
from deepseek_v3.inference.engine.drafts import MOST_DRAFTS, Acceptance
from deepseek_v3.inference.engine.engine import Engine, add_tokens, copy_to_host
from deepseek_v3.inference.engine.generation_request import FinishReason, Request, StreamedText, TokenLogprobs
from deepseek_v3.inference.engine.row_counts import RowCounts, measure_row_counts
from deepseek_v3.inference.engine.sampler import choose_tokens
from deepseek_v3.inference.engine.scheduler import Scheduler, require_room
from deepseek_v3.inference.engine.speculative_engine import DraftingForward, SpeculativeEngine
from deepseek_v3.inference.kv_cache import KvCache
from deepseek_v3.inference.sampling import SamplingConfig, request_seed
from deepseek_v3.mla.kv_compression import KvFormat, PagePool, pages_of
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value

_LONG_PROMPT = MOST_ROWS + 1  # the shortest that the modules of a model compute
_WARM_UP_BATCHES = 16, 32, 64  # for each height of a tile

_log = get_logger("Engine")


@dataclass(frozen=True)
class Completion:
    """The generated continuation of a prompt.

    `tokens` are all generated ids. `text` is their text, starting with a space if the first word follows one; it
    ends before a stop string or stop token and without the end-of-text marker. `finish_reason`: "stop" after a stop
    string or stop token, "end_of_text" after a token that ends texts, "length" after `max_new_tokens`, "context"
    when prompt and tokens fill the model's context. `logprobs`: one entry for each token, if they were asked for.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


class _Place(NamedTuple):
    """Where requests run: pages, and an engine over them.

    On a GPU, whose graphs take longer to capture than a short text, they stay for the next requests, if the weights
    of the model do not change.
    """

    pool: PagePool
    engine: Engine


class Generator:
    """Generates the continuations of prompts, at most `batch_size` at a time.

    A prompt starts with the marker that its tokenizer puts before texts, if there is one. A prompt without any
    token starts from the end-of-text marker, which separates the documents of a training corpus. Each prompt has
    its own seed, so its text does not depend on the other prompts of the batch.
    Only ids that the tokenizer has are generated, or with `all_ids` any id of the model, as other engines do; ids
    that the tokenizer lacks have no text. If the cache of `batch_size` prompts does not fit in the memory of the
    device, fewer run at a time. `kv` is the format of the cache; None follows the model's config.

    `speculate`: how many tokens the model's first MTP layer drafts per step, 0 to 2; `acceptance` counts what
    becomes of them. Greedy texts stay the same, sampled ones keep their distribution. Without the cache nothing is
    drafted. `kv_cache` makes pools of pages for its engines.

    A text depends neither on the texts beside it nor on when they come. On a GPU, where prompts are computed
    together, this holds up to rounding, and bit for bit with `batch_invariant`: then prompts, too, are computed
    token by token, which takes longer the longer they are.

    Raises GenerationError if the tokenizer has more ids than the model, for drafts by a model without MTP layers,
    and for `batch_invariant` on a GPU of a model that was not loaded for inference. Raises ConfigError for a cache
    in FP8 of a model whose kv_lora_rank is not a multiple of 128.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        tokenizer: Tokenizer,
        batch_size: int = 32,
        all_ids: bool = False,
        kv: KvFormat | None = None,
        speculate: int = 0,
        batch_invariant: bool = False,
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
        self._device = model.head_weight_VD.device
        _require_drafting(model, speculate)
        self._speculate, self.acceptance = speculate, Acceptance()
        self._kept: _Place | None = None
        self._keeps_engine = self._device.type != "cpu" and runs_by_rows(model)
        self._batch_invariant = batch_invariant
        if batch_invariant and self._device.type != "cpu" and not self._keeps_engine:
            raise GenerationError(
                "batch_invariant: needs a model without gradients whose weights are stored in the type that it "
                "computes in; load it by `load_for_inference`"
            )
        self.kv_cache = KvCache(model, kv, mtp_layers=min(speculate, 1))

    def generate(
        self, prompts: abc.Sequence[str], sampling: SamplingConfig, use_cache: bool = True
    ) -> list[Completion]:
        """Continues every prompt; the completions have the order of the prompts.

        Without the cache each step runs the model on the whole text again; the result is the same up to rounding.
        Raises GenerationError for a prompt longer than the model's context, for one that does not fit in the memory
        of the device with its new tokens, and for logits that are not finite, and DataError for a prompt that is
        not Unicode.
        """
        requests = [self.request(*self.encode(prompt), index, sampling) for index, prompt in enumerate(prompts)]
        self._complete(requests, use_cache)
        return [_completion(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]

    def continue_tokens(
        self, prompts: abc.Sequence[abc.Sequence[int]], sampling: SamplingConfig, use_cache: bool = True
    ) -> list[Completion]:
        """Continues prompts of one or more ids as `generate` continues texts, and adds no marker to them."""
        requests = [self.request(ids, ids, index, sampling) for index, ids in enumerate(prompts)]
        self._complete(requests, use_cache)
        texts = map(self._tokenizer.decode, prompts)
        return [_completion(text, request) for text, request in zip(texts, requests, strict=True)]

    def stream(
        self, prompt: str, sampling: SamplingConfig, use_cache: bool = True
    ) -> abc.Generator[str, None, Completion]:
        """Yields the text that `generate` returns for a single prompt, in parts as soon as they are final.

        A part never ends inside a character and holds no part of a stop string. The generator's return value is the
        completion. This call itself, not the first iteration, raises the errors of `generate` for the prompt.
        """
        request = self.request(*self.encode(prompt), 0, sampling)
        steps = self._steps([request], use_cache)  # raises its error
        return self._stream_text(prompt, request, steps)

    def stream_tokens(
        self, prompt: abc.Sequence[int], sampling: SamplingConfig
    ) -> abc.Generator[str, None, Completion]:
        """Yields the continuation of one or more ids as `stream` does that of a text; adds no marker to them."""
        request = self.request(prompt, prompt, 0, sampling)
        steps = self._steps([request], use_cache=True)  # raises its error
        return self._stream_text(self._tokenizer.decode(prompt), request, steps)

    def new_engine(self, pool: PagePool) -> Engine:
        """An engine without requests that runs up to `batch_size` of them at a time over a pool of pages."""
        on_cpu = self._device.type == "cpu"
        forward: DraftingForward
        forward = (
            CpuForward(self._model, pool, self._row_counts)
            if on_cpu
            else DeviceForward(self._model, pool, self._batch_invariant)
        )
        scheduler = Scheduler(pool, self._batch_size, PREFILL_TOKENS, self._speculate)
        place = forward, scheduler, self._device, self._num_ids
        if self._speculate:
            return SpeculativeEngine(*place, self._speculate, self.acceptance)
        return Engine(*place, reads_late=not on_cpu)

    def warm_up(self, engine: Engine) -> None:
        """Lets an engine on a GPU compute some texts, so that no request waits until kernels are compiled."""
        if self._device.type == "cpu":
            return
        _log.info("preparing kernels; the first time on a machine this takes half a minute")
        sampling = SamplingConfig(temperature=0, max_new_tokens=2)
        long = min(_LONG_PROMPT, self._model.config.max_position_embeddings - sampling.max_new_tokens)
        for number, length in ((1, long), *((number, 1) for number in _WARM_UP_BATCHES)):
            for index in range(min(number, self._batch_size)):
                engine.add(self.request([0] * length, [], index, sampling))
            while engine.has_work:
                _raise_error(engine.step())

    def encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids with which a request for a prompt begins, and those of them whose text its answer continues.

        Raises DataError for a prompt that is not Unicode.
        """
        encoded = self._tokenizer.encode(prompt)
        return [*self._tokenizer.prompt_start, *encoded] or [self._tokenizer.end_of_text], encoded

    def request(
        self, ids: abc.Sequence[int], shown: abc.Sequence[int], index: int, sampling: SamplingConfig
    ) -> Request:
        """The request that continues `ids`, number `index` of those that share a seed.

        `shown` are those of the ids whose text the new text continues.
        Raises GenerationError for ids longer than the model's context.
        """
        return Request(
            f"prompt {index + 1}",
            [*ids],
            sampling,
            request_seed(sampling.seed, index),
            StreamedText(self._tokenizer, sampling.stop, shown),
            self._model.config.max_position_embeddings,
            self._tokenizer.ends,
        )

    def _stream_text(
        self, prompt: str, request: Request, steps: abc.Iterator[None]
    ) -> abc.Generator[str, None, Completion]:
        num_yielded = 0
        for _ in steps:
            if new := request.text.shown[num_yielded:]:
                num_yielded += len(new)
                yield new
        return _completion(prompt, request)

    def _complete(self, requests: list[Request], use_cache: bool) -> None:
        for _ in self._steps(requests, use_cache):
            pass

    def _steps(self, requests: list[Request], use_cache: bool) -> abc.Iterator[None]:
        """The steps that finish all requests; this call itself raises the error of one that does not fit."""
        requests = [request for request in requests if request.finish_reason is None]
        if not use_cache:
            return self._steps_without_cache(requests)
        kept = 0 if self._kept is None else self._kept.pool.num_pages
        fitting = kept + self.kv_cache.pages_that_fit() if requests else 0
        for request in requests:
            require_room(request, fitting, self.kv_cache.layout.could_be_fp8)
        return self._engine_steps(requests, fitting)

    def _engine_steps(self, requests: list[Request], fitting: int) -> abc.Iterator[None]:
        if not requests:
            return
        most = sorted(pages_of(request.most_tokens) for request in requests)[-self._batch_size :]
        needed = sum(most)
        if self._keeps_engine:  # room for longer texts
            needed = 1 << (needed - 1).bit_length()
        place = self._place(min(needed, fitting))
        try:
            for request in requests:
                place.engine.add(request)
            while place.engine.has_work:
                _raise_error(place.engine.step())
                yield
        finally:
            place.engine.close()
            if self._keeps_engine:
                self._kept = place

    def _place(self, num_pages: int) -> _Place:
        """An engine over a pool of at least this many pages: the kept one, if it is as large, or a new one."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.pool.num_pages >= num_pages:
            return kept
        del kept
        pool = self.kv_cache.new_pool(num_pages)
        return _Place(pool, self.new_engine(pool))

    @cached_property
    def _row_counts(self) -> RowCounts:
        return measure_row_counts(self._model, self.kv_cache.compute_dtype)

    def _steps_without_cache(self, requests: list[Request]) -> abc.Iterator[None]:
        """Adds a token to up to `batch_size` requests per step, from their whole texts."""
        while running := [request for request in requests if request.finish_reason is None][: self._batch_size]:
            with torch.inference_mode():
                logits_BV = self._model.logits(self._last_states(running))[:, : self._num_ids]
                choice = copy_to_host(choose_tokens(logits_BV, running))
            _raise_error(add_tokens(running, choice))
            yield

    def _last_states(self, requests: list[Request]) -> Tensor:
        """The state of each request's last token, (B, D); the causal mask hides the padding on the right."""
        texts = [torch.tensor(request.ids) for request in requests]
        states_BSD = self._model.final_states(pad_sequence(texts, batch_first=True).to(self._device))
        return torch.stack([states_SD[len(text) - 1] for states_SD, text in zip(states_BSD, texts, strict=True)])


def _require_drafting(model: DeepSeekV3, speculate: int) -> None:
    """Raises GenerationError for a number of drafts that is not offered, or a model that cannot draft."""
    if not 0 <= speculate <= MOST_DRAFTS:
        raise GenerationError(f"speculate = {format_value(speculate)}: expected 0 to {MOST_DRAFTS} drafts per step")
    if speculate and not model.config.num_nextn_predict_layers:
        raise GenerationError(
            f"speculate = {speculate}: the model has no MTP layer to draft tokens with; take weights that hold one "
            "(num_nextn_predict_layers = 1 or more), loaded with mtp_layers = 1, or set speculate = 0"
        )


def _completion(prompt: str, request: Request) -> Completion:
    assert request.finish_reason is not None
    logprobs = None if request.sampling.logprobs is None else tuple(request.logprobs)
    return Completion(prompt, request.text.shown, tuple(request.generated), request.finish_reason, logprobs)


def _raise_error(requests: abc.Iterable[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error

"""A request to the engine: a prompt to continue, its tokens and their text, and the pages that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from deepseek_v3.data.tokens.stream_decoder import StreamDecoder
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.utils.errors import GenerationError

FinishReason = Literal["stop", "end_of_text", "length", "context", "cancelled", "failed"]


class TokenLogprobs(NamedTuple):
    """The log-probability of a token, and the most probable tokens with theirs, in nats.

    They are those of the model itself, before penalty, temperature and limits.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Draft(NamedTuple):
    """A token that the model's MTP layer proposes for the next place of a text.

    `probabilities_V`: the distribution from which it was drawn, on the device; None if it was the most probable.
    """

    token: int
    probabilities_V: Tensor | None


class StreamedText:
    """The text of a completion, built token by token. `shown` never holds a stop string or the start of one.

    `prompt` are the ids that the text continues. Without stop strings, tokens are decoded when the text is wanted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], prompt: Sequence[int] = ()) -> None:
        self._shown = ""
        self._held = ""  # the end of the text that may be the start of a stop string
        self._new: list[int] = []  # not decoded yet
        self._stop = stop
        self._decoder = StreamDecoder(tokenizer, prompt)

    @property
    def shown(self) -> str:
        """The text that no later token can change."""
        self._decode()
        return self._shown

    def push(self, token: int) -> bool:
        """Adds the next token; returns True if it completes a stop string, which ends the text."""
        self._new.append(token)
        return bool(self._stop) and self._decode()

    def end(self) -> bool:
        """Adds the text that was held back for an unfinished character or stop string to `shown`.

        Returns True if that text completes a stop string, which ends the text before it.
        """
        stopped = self._decode() or self._ends_with(self._decoder.flush())
        if not stopped:
            self._shown += self._held
        return stopped

    def _decode(self) -> bool:
        new, self._new = self._new, []
        return bool(new) and self._ends_with(self._decoder.push(*new))

    def _ends_with(self, new: str) -> bool:
        """Adds text up to the first completed stop string; the result does not depend on the parts' borders."""
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._shown += self._held[: min(found)[1]]
            return True
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        num_held = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        num_shown = len(self._held) - num_held
        self._shown += self._held[:num_shown]
        self._held = self._held[num_shown:]
        return False


@dataclass(eq=False)
class Request:
    """A prompt that the engine continues.

    `ids` are the ids of the prompt and then the generated ones that the host knows; `num_pending` more have been
    computed, whose ids are still on the device. `name` is used in errors. `seed` has 64 bits: tokens depend on it,
    their positions and the sampling alone. `sequence` are the tokens in the cache, None while the request waits.
    `seen_V`: on the device, which ids occur; kept if the sampling has a repetition penalty. `drafts`: what may
    follow the known ids. They stay when the request gives its pages back, so its next tokens do not depend on that.
    """

    name: str
    ids: list[int]
    sampling: SamplingConfig
    seed: int
    text: StreamedText
    context: int
    ends: tuple[int, ...]
    num_prompt: int = field(init=False)
    num_pending: int = 0
    finish_reason: FinishReason | None = None
    error: GenerationError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    sequence: CachedSequence | None = None
    seen_V: Tensor | None = None
    drafts: list[Draft] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)
        if self.num_prompt > self.context:
            raise GenerationError(
                f"{self.name} is {self.num_prompt} tokens long, expected at most the model's context of "
                f"{self.context} (max_position_embeddings); shorten it"
            )
        if self.num_prompt == self.context:
            self.finish("context")

    @property
    def generated(self) -> list[int]:
        """The generated ids that the host knows."""
        return self.ids[self.num_prompt :]

    @property
    def num_tokens(self) -> int:
        """The ids that the host knows, and those that are pending."""
        return len(self.ids) + self.num_pending

    @property
    def most_tokens(self) -> int:
        """The length of the longest text that the request may become."""
        return min(self.num_prompt + self.sampling.max_new_tokens, self.context)

    @property
    def num_uncached(self) -> int:
        """Tokens that are to be computed before the next one can be sampled; none if no more may follow."""
        if self.finish_reason is not None or self.num_tokens == self.most_tokens:
            return 0
        return self.num_tokens - (0 if self.sequence is None else self.sequence.length)

    def take(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Adds a token that was pending, and finishes the request if the token ends it."""
        self.ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.ends:
            self.finish("end_of_text")
        elif token in self.sampling.stop_tokens or self.text.push(token):
            self.finish("stop")
        elif len(self.ids) - self.num_prompt == self.sampling.max_new_tokens:
            self.finish("length")
        elif len(self.ids) == self.context:
            self.finish("context")

    def fail(self, error: GenerationError) -> None:
        """Finishes the request, which cannot go on."""
        self.error = error
        self.finish("failed")

    def finish(self, reason: FinishReason) -> None:
        """Ends the text and gives the pages back."""
        stopped = reason != "stop" and self.text.end()
        self.finish_reason = "stop" if stopped else reason
        self.free()

    def free(self) -> None:
        """Gives the pages back, and lets go of their pool."""
        if self.sequence is not None:
            self.sequence.free()
        self.sequence = None

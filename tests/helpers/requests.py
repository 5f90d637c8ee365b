"""Requests to the engine, for tests."""

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.engine.generation_request import Request, StreamedText
from deepseek_v3.inference.sampling import SamplingConfig, request_seed


class NoText(StreamedText):
    """The text of a request whose tokens have none."""

    def __init__(self) -> None:
        """There is nothing to decode."""

    @property
    def shown(self) -> str:
        return ""

    def push(self, token: int) -> bool:
        return token < 0

    def end(self) -> bool:
        return False


def make_request(
    ids: list[int],
    sampling: SamplingConfig,
    index: int = 0,
    context: int = 10**6,
    tokenizer: Tokenizer | None = None,
) -> Request:
    """A request with number `index` of its seed; without a tokenizer it has no text, and no token ends it."""
    text = NoText() if tokenizer is None else StreamedText(tokenizer, sampling.stop, ids)
    ends = () if tokenizer is None else tokenizer.ends
    return Request(f"prompt {index + 1}", [*ids], sampling, request_seed(sampling.seed, index), text, context, ends)

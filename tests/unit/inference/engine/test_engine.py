"""The engine under random histories: requests come, are cancelled and preempted, and every page comes back."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.inference.engine.engine import Engine
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.inference.engine.scheduler import Scheduler
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool, latent_format
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.errors import GenerationError
from helpers.models import small_config
from helpers.requests import make_request

CPU = torch.device("cpu")
CONFIG = small_config(num_hidden_layers=1, kv_lora_rank=1, qk_rope_head_dim=2)
VOCABULARY = 50


def next_token(ids: Sequence[int]) -> int:
    """What the model of these tests, greedy, puts after some tokens: every one of them counts."""
    return sum((place + 1) * token for place, token in enumerate(ids)) % VOCABULARY


class CountingForward:
    """A model that keeps tokens in the cache in place of latents, and continues what it reads there."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        for chunk in chunks:
            assert chunk.end == chunk.sequence.length
            assert not chunk.is_prompt or chunk.start % PAGE == 0
            self._write(chunk.sequence, chunk.start, torch.tensor(chunk.ids))
        return torch.stack([self._state(chunk.sequence) for chunk in chunks])

    def decode(self, sequences: Sequence[CachedSequence], tokens_B: Tensor) -> Tensor:
        for sequence, token in zip(sequences, tokens_B, strict=True):
            self._write(sequence, sequence.length - 1, token[None])
        return torch.stack([self._state(sequence) for sequence in sequences])

    def logits(self, states_BD: Tensor) -> Tensor:
        return states_BD

    def _rows(self, sequence: CachedSequence) -> Tensor:
        return (torch.tensor(sequence.pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def _write(self, sequence: CachedSequence, start: int, tokens: Tensor) -> None:
        slots = self._rows(sequence)[start : start + len(tokens)]
        self._pool.pages[0].flatten(0, 1)[slots] = tokens[:, None].float()

    def _state(self, sequence: CachedSequence) -> Tensor:
        read = self._pool.pages[0].flatten(0, 1)[self._rows(sequence)[: sequence.length], 0]
        return torch.nn.functional.one_hot(torch.tensor(next_token(read.int().tolist())), VOCABULARY).float()


def new_engine(num_pages: int, max_running: int, prefill_tokens: int, reads_late: bool) -> tuple[Engine, PagePool]:
    pool = PagePool(CONFIG, latent_format(CONFIG, torch.float32), num_pages, CPU)
    scheduler = Scheduler(pool, max_running, prefill_tokens)
    return Engine(CountingForward(pool), scheduler, CPU, VOCABULARY, reads_late), pool


def continued(request: Request) -> list[int]:
    """The tokens that a request should get."""
    ids = request.ids[: request.num_prompt]
    for _ in range(request.most_tokens - request.num_prompt):
        ids = [*ids, next_token(ids)]
        if ids[-1] in request.sampling.stop_tokens:
            break
    return ids[request.num_prompt :]


arrivals = st.tuples(st.integers(1, 150), st.integers(1, 70), st.sampled_from([(), (7,)]))
histories = st.lists(st.one_of(arrivals, st.integers(0, 20), st.none()), max_size=30)


@settings(max_examples=150, deadline=None)
@given(histories, st.integers(4, 9), st.integers(1, 5), st.sampled_from([1, 64, 100, 8192]), st.booleans())
def test_every_request_gets_its_tokens_and_every_page_comes_back(
    history: list[tuple[int, int, tuple[int, ...]] | int | None],
    num_pages: int,
    max_running: int,
    prefill_tokens: int,
    reads_late: bool,
) -> None:
    """A history adds requests (tokens of the prompt, new tokens, stop tokens), cancels some, and steps (None)."""
    engine, pool = new_engine(num_pages, max_running, prefill_tokens, reads_late)
    requests: list[Request] = []
    for event in history:
        if event is None:
            engine.step()
        elif isinstance(event, int):
            if event < len(requests):
                engine.cancel(requests[event])
        else:
            length, new, stop = event
            ids = [(length * place + new) % VOCABULARY for place in range(length)]
            requests.append(make_request(ids, SamplingConfig(0, max_new_tokens=new, stop_tokens=stop)))
            engine.add(requests[-1])
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        assert steps < 5000
    assert pool.num_free == pool.num_pages
    for request in requests:
        wanted = continued(request)
        if request.finish_reason == "cancelled":
            assert request.generated == wanted[: len(request.generated)]
        else:
            assert request.generated == wanted
            assert request.finish_reason == ("stop" if wanted[-1] in request.sampling.stop_tokens else "length")


@pytest.mark.parametrize("reads_late", [False, True])
def test_the_youngest_gives_way_and_goes_on_later(reads_late: bool) -> None:
    engine, pool = new_engine(num_pages=3, max_running=2, prefill_tokens=8192, reads_late=reads_late)
    requests = [make_request([length] * length, SamplingConfig(0, max_new_tokens=100)) for length in (60, 20)]
    for request in requests:
        engine.add(request)
    held = []
    while engine.has_work:
        engine.step()
        held.append(tuple(0 if each.sequence is None else len(each.sequence.pages) for each in requests))
    assert (2, 1) in held
    assert (3, 0) in held
    assert held[-1] == (0, 0)
    assert [request.generated for request in requests] == [continued(request) for request in requests]
    assert pool.num_free == 3


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    engine, _ = new_engine(num_pages=20, max_running=2, prefill_tokens=PAGE, reads_late=False)
    first, second = (make_request([3] * length, SamplingConfig(0, max_new_tokens=30)) for length in (5, 300))
    engine.add(first)
    engine.step()
    engine.add(second)
    for _ in range(4):
        assert engine.step() == [first]
    assert engine.step() == [first, second]


def test_what_can_never_fit_is_refused() -> None:
    engine, _ = new_engine(num_pages=2, max_running=2, prefill_tokens=64, reads_late=False)
    with pytest.raises(GenerationError, match=r"is 100 tokens long, .* room for 129 .* found room for 128"):
        engine.add(make_request([1] * 100, SamplingConfig(max_new_tokens=29)))
    engine.add(make_request([1] * 100, SamplingConfig(max_new_tokens=28)))


def test_closing_and_cancelling_give_all_pages_back() -> None:
    engine, pool = new_engine(num_pages=9, max_running=2, prefill_tokens=64, reads_late=True)
    requests = [make_request([1] * 70, SamplingConfig(0, max_new_tokens=28)) for _ in range(4)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    for _ in range(2):
        engine.cancel(requests[0])
    assert requests[0].sequence is None
    engine.close()
    assert pool.num_free == 9
    assert not engine.has_work
    assert {request.finish_reason for request in requests} == {"cancelled"}

"""Speculative decoding: texts keep their distribution, and what is rejected leaves nothing behind."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.inference.engine.drafts import Acceptance
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.inference.engine.scheduler import Scheduler
from deepseek_v3.inference.engine.speculative_engine import SpeculativeEngine
from deepseek_v3.inference.sampling import SamplingConfig, next_token_probabilities, penalized
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool, latent_format
from deepseek_v3.ops.mla_decode.formats import PAGE
from helpers.models import small_config
from helpers.requests import make_request

CPU = torch.device("cpu")
CONFIG = small_config(num_hidden_layers=1, kv_lora_rank=1, qk_rope_head_dim=2)
Model = Callable[[Tensor], Tensor]  # from tokens (T,) to the logits after each of them, (T, V)


class ScriptedForward:
    """A main model and an MTP layer that are functions of the tokens so far.

    The rows of the cache hold tokens in place of latents: those of the main layer the token at their position, and
    those of the MTP layer the token after it. So a row that is missing, stale or wrong changes what follows.
    """

    def __init__(self, pool: PagePool, main: Model, mtp: Model) -> None:
        self._pool, self._main, self._mtp = pool, main, mtp

    def prefill(self, *_: object) -> Tensor:
        raise AssertionError("the speculative engine needs all states of a chunk")

    decode = prefill

    def states(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """The states: the position, and the logits after it."""
        found = []
        for chunk in chunks:
            assert not chunk.is_prompt or chunk.start % PAGE == 0
            assert chunk.end <= chunk.sequence.length
            self._write(0, chunk)
            found.append(self._with_positions(chunk, self._main(self._read(0, chunk))))
        return found

    def draft_states(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for chunk, hidden_ND in zip(chunks, hidden, strict=True):
            assert not chunk.is_prompt or chunk.start % PAGE == 0
            is_second = hidden_ND[0, 0].item() != chunk.start
            assert hidden_ND[:, 0].tolist() == [place - is_second for place in range(chunk.start, chunk.end)]
            self._write(1, chunk)
            ids_T = torch.cat((self._read(0, chunk)[:1], self._read(1, chunk)))
            found.append(self._with_positions(chunk, self._mtp(ids_T)[1:]))
        return found

    def logits(self, states_BD: Tensor) -> Tensor:
        return states_BD[:, 1:]

    def _with_positions(self, chunk: Chunk, logits_TV: Tensor) -> Tensor:
        places_N = torch.arange(chunk.start, chunk.end)
        return torch.cat((places_N[:, None], logits_TV[places_N]), dim=1)

    def _slots(self, sequence: CachedSequence) -> Tensor:
        return (torch.tensor(sequence.pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def _write(self, layer: int, chunk: Chunk) -> None:
        slots = self._slots(chunk.sequence)[chunk.start : chunk.end]
        self._pool.pages[layer].flatten(0, 1)[slots] = torch.tensor(chunk.ids)[:, None].float()

    def _read(self, layer: int, chunk: Chunk) -> Tensor:
        return self._pool.pages[layer].flatten(0, 1)[self._slots(chunk.sequence)[: chunk.end], 0].long()


class Script:
    """An engine over scripted models."""

    def __init__(
        self,
        main: Model,
        mtp: Model,
        num_ids: int,
        speculate: int,
        num_pages: int = 600,
        max_running: int = 600,
        prefill_tokens: int = 8192,
    ) -> None:
        layout = latent_format(CONFIG, torch.float32)
        self.pool = PagePool(CONFIG, layout, num_pages, CPU, mtp_layers=1)
        self.acceptance = Acceptance()
        scheduler = Scheduler(self.pool, max_running, prefill_tokens, speculate)
        forward = ScriptedForward(self.pool, main, mtp)
        self.engine = SpeculativeEngine(forward, scheduler, CPU, num_ids, speculate, self.acceptance)

    def run(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            self.engine.step()
        assert self.pool.num_free == self.pool.num_pages


def after_last(table_VV: Tensor) -> Model:
    """A model whose logits depend on the last token."""
    return lambda ids_T: table_VV[ids_T]


CASES = [
    (1, {}),
    (1, {"temperature": 0.6, "top_k": 3}),
    (2, {"min_p": 0.25, "temperature": 1.5}),
    (2, {"repetition_penalty": 1.4, "temperature": 0.8, "top_p": 0.9}),
]
IDS, PROMPT, NEW = 4, [0], 4
QUANTILES = {15: 37.7, 30: 59.7, 60: 99.6, 120: 173.6, 255: 330.5}  # 99.9 % of chi-square, by degrees of freedom


def probability(table_VV: Tensor, sampling: SamplingConfig, new: Sequence[int]) -> float:
    """How often these tokens follow the prompt, step by step."""
    product, ids = 1.0, [*PROMPT]
    for token in new:
        seen_1V = torch.tensor([[each in ids for each in range(IDS)]])
        logits_1V = penalized(table_VV[ids[-1]][None], seen_1V, [sampling.repetition_penalty])
        product *= next_token_probabilities(logits_1V, [sampling])[0, token].item()
        ids.append(token)
    return product


@pytest.mark.parametrize(("speculate", "fields"), CASES, ids=str)
def test_texts_keep_their_distribution(speculate: int, fields: dict[str, float]) -> None:
    """Pearson's chi-square over the texts of 1000 requests, below its 99.9 % quantile."""
    generator = torch.Generator().manual_seed(1)
    main_VV, mtp_VV = torch.randn(2, IDS, IDS, generator=generator, dtype=torch.float64)
    sampling = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": NEW, **fields})
    script = Script(after_last(main_VV), after_last(mtp_VV), IDS, speculate)
    requests = [make_request(PROMPT, sampling, index) for index in range(1000)]

    script.run(requests)

    counts = dict.fromkeys(itertools.product(range(IDS), repeat=NEW), 0)
    for request in requests:
        counts[tuple(request.generated)] += 1
    expected = {new: len(requests) * probability(main_VV, sampling, new) for new in counts}
    assert all(counts[new] == 0 for new, number in expected.items() if number == 0)
    rare = [new for new, number in expected.items() if 0 < number < 5]
    cells = [(counts[new], number) for new, number in expected.items() if number >= 5]
    if rare:
        cells.append((sum(counts[new] for new in rare), sum(expected[new] for new in rare)))
    statistic = sum((count - number) ** 2 / number for count, number in cells)
    assert statistic < min(limit for freedom, limit in QUANTILES.items() if freedom >= len(cells) - 1)
    assert all(0.2 < share < 0.95 for share in script.acceptance.shares)
    assert script.acceptance.tokens_per_step > 1.2


def test_drafts_of_the_models_own_distribution_are_all_accepted() -> None:
    table_VV = torch.randn(IDS, IDS, generator=torch.Generator().manual_seed(0))
    script = Script(after_last(table_VV), after_last(table_VV), IDS, speculate=2)
    script.run([make_request(PROMPT, SamplingConfig(1.0, 1.0, max_new_tokens=31), index) for index in range(20)])
    assert script.acceptance.shares == (1.0, 1.0)
    assert script.acceptance.tokens_per_step == 3
    assert str(script.acceptance) == "3.00 tokens per step, 100% and 100% of drafts accepted"


VOCABULARY = 50


def one_hot(tokens_T: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens_T % VOCABULARY, VOCABULARY).float()


def weighted_sum(ids_T: Tensor) -> Tensor:
    """A main model whose next token depends on every token so far."""
    return one_hot((torch.arange(1, len(ids_T) + 1) * ids_T).cumsum(0))


def mostly_right(ids_T: Tensor) -> Tensor:
    """An MTP layer that expects the right token two times in three."""
    is_right_T1 = (ids_T.cumsum(0) % 3 > 0)[:, None]
    return torch.where(is_right_T1, weighted_sum(ids_T), one_hot(torch.zeros_like(ids_T)))


def count(ids_T: Tensor) -> Tensor:
    """A model that counts upward."""
    return one_hot(ids_T + 1)


def greedy(ids: Sequence[int], request: Request) -> list[int]:
    """The tokens that a request should get."""
    new: list[int] = []
    while len(ids) + len(new) < request.most_tokens:
        new.append(int(weighted_sum(torch.tensor([*ids, *new]))[-1].argmax()))
        if new[-1] in request.sampling.stop_tokens:
            break
    return new


arrivals = st.tuples(st.integers(1, 150), st.integers(1, 70), st.sampled_from([(), (7,)]))
histories = st.lists(st.one_of(arrivals, st.integers(0, 20), st.none()), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    histories, st.integers(4, 9), st.integers(1, 5), st.sampled_from([1, 64, 100, 8192]), st.sampled_from([1, 2])
)
def test_every_request_gets_its_tokens_and_every_page_comes_back(
    history: list[tuple[int, int, tuple[int, ...]] | int | None],
    num_pages: int,
    max_running: int,
    prefill_tokens: int,
    speculate: int,
) -> None:
    """A history adds requests (tokens of the prompt, new tokens, stop tokens), cancels some, and steps (None)."""
    script = Script(weighted_sum, mostly_right, VOCABULARY, speculate, num_pages, max_running, prefill_tokens)
    requests: list[Request] = []
    for event in history:
        if event is None:
            script.engine.step()
        elif isinstance(event, int):
            if event < len(requests):
                script.engine.cancel(requests[event])
        else:
            length, new, stop = event
            ids = [(length * place + new) % VOCABULARY for place in range(length)]
            sampling = SamplingConfig(0, max_new_tokens=new, stop_tokens=stop)
            requests.append(make_request(ids, sampling, context=200))
            script.engine.add(requests[-1])
    script.run([])
    for request in requests:
        wanted = greedy(request.ids[: request.num_prompt], request)
        if request.finish_reason == "cancelled":
            assert request.generated == wanted[: len(request.generated)]
        else:
            assert request.generated == wanted


def test_the_text_ends_inside_an_accepted_run() -> None:
    """The model counts upward, and the MTP layer foresees it; what would follow the end is dropped."""
    ends = {
        "stop": SamplingConfig(0, max_new_tokens=20, stop_tokens=(6,)),
        "length": SamplingConfig(0, max_new_tokens=5),
        "context": SamplingConfig(0, max_new_tokens=20),
    }
    for reason, sampling in ends.items():
        script = Script(count, count, VOCABULARY, speculate=2)
        request = make_request([1], sampling, context=6 if reason == "context" else 100)
        script.run([request])
        assert request.generated == [2, 3, 4, 5, 6]
        assert request.finish_reason == reason
        assert script.acceptance.shares == (1.0, 1.0) or reason != "stop"
        assert (script.acceptance.tokens, script.acceptance.steps) == (4, 2)


def test_a_penalty_counts_the_tokens_that_were_accepted() -> None:
    """Greedy with a penalty: the same tokens as with drafts that are never right."""
    table_VV = torch.randn(9, 9, generator=torch.Generator().manual_seed(3)).abs()
    sampling = SamplingConfig(0, repetition_penalty=1.7, max_new_tokens=40)
    found = []
    for mtp in (table_VV, -table_VV):
        script = Script(after_last(table_VV), after_last(mtp), 9, speculate=2)
        request = make_request([2], sampling)
        script.run([request])
        found.append((request.generated, script.acceptance.accepted[0]))
    assert found[0][0] == found[1][0]
    assert found[0][1] > found[1][1]


def test_logits_that_are_not_finite_fail_their_request() -> None:
    def main(ids_T: Tensor) -> Tensor:
        return count(ids_T).masked_fill((ids_T == 4)[:, None], torch.nan)

    script = Script(main, count, VOCABULARY, speculate=2)
    sampling = SamplingConfig(0, max_new_tokens=4)
    bad, good = make_request([1], sampling), make_request([10], sampling)
    script.run([bad, good])
    assert bad.finish_reason == "failed"
    assert bad.generated == [2, 3, 4]
    assert "NaN or infinite" in str(bad.error)
    assert good.generated == [11, 12, 13, 14]

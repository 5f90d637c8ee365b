"""On the CPU a request gets the same numbers, to the last bit, alone and in any batch and schedule."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.inference.engine.cpu_forward import CpuForward
from deepseek_v3.inference.engine.drafts import Acceptance
from deepseek_v3.inference.engine.engine import Engine
from deepseek_v3.inference.engine.generation_request import Request
from deepseek_v3.inference.engine.invariant_ops import RmsNorm, rotate, sigmoid, swiglu, turns_of
from deepseek_v3.inference.engine.row_counts import RowCounts, agreeing, measure_row_counts
from deepseek_v3.inference.engine.scheduler import Scheduler
from deepseek_v3.inference.engine.speculative_engine import SpeculativeEngine
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.mla.kv_compression import PagePool, latent_format
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.layers import RMSNorm
from deepseek_v3.ops.rotary.reference import rotate as reference_rotate
from deepseek_v3.ops.swiglu.reference import swiglu as reference_swiglu
from helpers.caches import poisoned
from helpers.models import YARN, foreseeable_model, small_config, small_model
from helpers.requests import make_request

CPU = torch.device("cpu")
VOCABULARY = 97
LENGTHS = [1, 3, 63, 64, 65, 70, 130, 5]
NEW = [20, 9, 70, 12, 1, 66, 15, 40]
SAMPLINGS = [
    SamplingConfig(0, logprobs=3),
    SamplingConfig(1.0, 1.0, seed=1, logprobs=3),
    SamplingConfig(0.8, 0.9, 20, 1.1, seed=2, min_p=0.01, logprobs=3),
    SamplingConfig(0, repetition_penalty=1.3, logprobs=3),
]
SHAPES = {
    "every part": {},
    "no query compression, one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "dense, YaRN, tied": {"first_k_dense_replace": 3, "rope_scaling": YARN, "tie_word_embeddings": True},
    "no shared expert, FP8 cache": {"n_shared_experts": 0, "kv_lora_rank": 128, "use_fp8_kv": True},
}


class Schedule(NamedTuple):
    num_pages: int = 40
    max_running: int = 8
    prefill_tokens: int = 8192
    reads_late: bool = False
    order: tuple[int, ...] = tuple(range(len(LENGTHS)))
    steps_between: int = 0
    speculate: int = 0


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> DeepSeekV3:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": 3}
    return small_model(small_config(**{**sizes, **SHAPES[request.param]})).eval()


def run(model: DeepSeekV3, counts: RowCounts, schedule: Schedule) -> dict[int, tuple[object, ...]]:
    """Tokens and log-probabilities of the requests of a schedule, by their numbers."""
    return run_and_count(model, counts, schedule)[0]


def run_and_count(
    model: DeepSeekV3, counts: RowCounts, schedule: Schedule
) -> tuple[dict[int, tuple[object, ...]], Acceptance]:
    """The same, and what became of the drafts."""
    layout = latent_format(model.config, model.compute_dtype or model.head_weight_VD.dtype)
    pool = poisoned(PagePool(model.config, layout, schedule.num_pages, CPU, min(schedule.speculate, 1)))
    scheduler = Scheduler(pool, schedule.max_running, schedule.prefill_tokens, schedule.speculate)
    forward, acceptance = CpuForward(model, pool, counts), Acceptance()
    if schedule.speculate:
        engine: Engine = SpeculativeEngine(forward, scheduler, CPU, VOCABULARY, schedule.speculate, acceptance)
    else:
        engine = Engine(forward, scheduler, CPU, VOCABULARY, schedule.reads_late)
    requests: dict[int, Request] = {}
    for index in schedule.order:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCABULARY, (LENGTHS[index],), generator=generator).tolist()
        sampling = SAMPLINGS[index % len(SAMPLINGS)]
        sampling = SamplingConfig(**{**vars(sampling), "max_new_tokens": NEW[index]})
        requests[index] = make_request(ids, sampling, index, context=256)
        engine.add(requests[index])
        for _ in range(schedule.steps_between):
            engine.step()
    while engine.has_work:
        engine.step()
    assert pool.num_free == pool.num_pages
    return {index: (tuple(each.generated), tuple(each.logprobs)) for index, each in requests.items()}, acceptance


SCHEDULES = [
    Schedule(),
    Schedule(order=(7, 6, 5, 4, 3, 2, 1, 0), steps_between=3),
    Schedule(num_pages=5, prefill_tokens=64),  # preempts
    Schedule(num_pages=6, max_running=3, reads_late=True, order=(3, 1, 6, 0, 5, 2, 7, 4), steps_between=1),
]


def test_the_numbers_of_a_request_are_the_same_in_every_schedule(model: DeepSeekV3) -> None:
    counts = measure_row_counts(model, torch.float32)
    alone = {index: run(model, counts, Schedule(order=(index,)))[index] for index in range(len(LENGTHS))}
    for schedule in SCHEDULES:
        assert run(model, counts, schedule) == alone, schedule


def test_the_numbers_are_the_same_in_bfloat16_too() -> None:
    torch.manual_seed(0)
    model = small_model(small_config(vocab_size=VOCABULARY, max_position_embeddings=256), torch.bfloat16).eval()
    counts = measure_row_counts(model, torch.bfloat16)
    alone = {index: run(model, counts, Schedule(order=(index,)))[index] for index in range(len(LENGTHS))}
    for schedule in SCHEDULES[1:3]:
        assert run(model, counts, schedule) == alone, schedule


SPECULATED = (0, 1, 2, 3, 4, 6)  # the numbers of the requests that are drafted
SPECULATIVE_SHAPES = {
    "one draft, FP8 cache": (1, torch.float32, {"kv_lora_rank": 128, "use_fp8_kv": True}),
    "two drafts, bfloat16": (2, torch.bfloat16, {}),
    "two drafts, dense, two MTP layers": (
        2,
        torch.float32,
        {"first_k_dense_replace": 2, "q_lora_rank": None, "num_nextn_predict_layers": 2},
    ),
}


def speculative_model(dtype: torch.dtype = torch.float32, **changes: object) -> DeepSeekV3:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": 2}
    sizes |= {"num_nextn_predict_layers": 1}
    return foreseeable_model(small_config(**{**sizes, **changes}), dtype).eval()


@pytest.mark.parametrize("shape", SPECULATIVE_SHAPES)
def test_drafts_change_no_greedy_token_in_any_schedule(shape: str) -> None:
    speculate, dtype, changes = SPECULATIVE_SHAPES[shape]
    model = speculative_model(dtype, **changes)
    counts = measure_row_counts(model, dtype)
    undrafted = run(model, counts, Schedule(order=SPECULATED))
    wanted, acceptance = run_and_count(model, counts, Schedule(order=SPECULATED, speculate=speculate))
    for index in SPECULATED:
        if SAMPLINGS[index % len(SAMPLINGS)].temperature == 0:
            assert wanted[index] == undrafted[index]
    assert all(0.1 < share < 1 for share in acceptance.shares)
    assert len(acceptance.shares) == speculate
    for schedule in (
        Schedule(5, 8, 64, order=SPECULATED, speculate=speculate),  # preempts
        Schedule(6, 3, order=(3, 1, 6, 0, 2, 4), steps_between=1, speculate=speculate),
    ):
        assert run_and_count(model, counts, schedule) == (wanted, acceptance), schedule
    for index in (1, 3):
        assert run(model, counts, Schedule(order=(index,), speculate=speculate))[index] == wanted[index]


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(len(LENGTHS))), st.integers(4, 12), st.sampled_from([1, 100, 8192]), st.integers(1, 2))
def test_any_schedule_gives_the_same_tokens_with_drafts(
    order: list[int], num_pages: int, prefill_tokens: int, speculate: int
) -> None:
    model = speculative_model(num_hidden_layers=1, first_k_dense_replace=0)
    counts = measure_row_counts(model, torch.float32)
    schedule = Schedule(num_pages, 5, prefill_tokens, False, tuple(order[:3]), 2, speculate)
    wanted = run(model, counts, Schedule(order=tuple(sorted(order[:3])), speculate=speculate))
    assert run(model, counts, schedule) == wanted


@torch.no_grad()
def test_log_probabilities_are_those_of_training(model: DeepSeekV3) -> None:
    if model.config.use_fp8_kv:
        pytest.skip("rows in FP8 are rounded")
    found = run(model, measure_row_counts(model, torch.float32), Schedule())
    for index, (tokens, logprobs) in found.items():
        ids = torch.randint(VOCABULARY, (LENGTHS[index],), generator=torch.Generator().manual_seed(index)).tolist()
        hidden = model.hidden_states(torch.tensor([[*ids, *tokens]]), with_mtp=False)
        wanted_SV = model.logits(hidden.main_BSD)[0].log_softmax(-1)[len(ids) - 1 : -1]
        assert [each.logprob for each in logprobs] == pytest.approx(
            [wanted_SV[place, token].item() for place, token in enumerate(tokens)], abs=1e-4
        )


@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 10**6))
def test_operations_do_not_depend_on_the_place_of_a_row(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=generator) * 20 for _ in range(2))
    norm = RMSNorm(width, 1e-6)
    torch.nn.init.normal_(norm.weight, generator=generator)
    for operation in (
        sigmoid,
        RmsNorm(norm),
        lambda rows: swiglu(rows, y[: len(rows)]),
    ):
        whole = operation(x)
        for number in {1, rows // 2 + 1, rows}:
            assert torch.equal(operation(x[:number]), whole[:number])


def test_operations_are_those_of_the_model() -> None:
    config = small_config()
    x = torch.randn(9, 3, config.qk_rope_head_dim)
    cos, sin = rotary_tables(torch.arange(9)[None], config)
    assert torch.equal(rotate(x, turns_of(cos[0], sin[0])), reference_rotate(x[None], cos, sin)[0])
    norm = RMSNorm(config.qk_rope_head_dim, 1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(RmsNorm(norm)(x), norm(x).detach())
    torch.testing.assert_close(sigmoid(100 * x), torch.sigmoid(100 * x))
    gate, up = torch.randn(2, 50, 7) * 30
    torch.testing.assert_close(swiglu(gate, up), reference_swiglu(gate, up))
    extreme = torch.tensor([-1e4, -90.0, 90.0, 1e4])
    assert swiglu(extreme, torch.ones(4)).isfinite().all()


def test_numbers_of_rows_that_disagree_are_left_out() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x + (len(x) == 4)

    def late(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[:8], x[8:] + 1))

    assert agreeing((2, 4, 8, 16), 8, [(3, lambda x: x * 2)]) == (2, 4, 8, 16)
    assert agreeing((2, 4, 8, 16), 8, [(3, product), (5, lambda x: x)]) == (2, 8, 16)
    assert agreeing((2, 4, 8, 16), 8, [(3, late)]) == (2, 4, 8)
    assert agreeing((2, 4, 8, 16), 8, [(3, lambda x: x * len(x))]) == (8,)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(LENGTHS))), st.integers(4, 12), st.sampled_from([1, 100, 8192]), st.booleans())
def test_any_schedule_gives_the_tokens_of_any_other(
    order: list[int], num_pages: int, prefill_tokens: int, reads_late: bool
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": 1}
    model = small_model(small_config(**sizes, first_k_dense_replace=0)).eval()
    counts = measure_row_counts(model, torch.float32)
    schedule = Schedule(num_pages, 5, prefill_tokens, reads_late, tuple(order[:4]), 2)
    wanted = run(model, counts, Schedule(order=tuple(sorted(order[:4]))))
    assert run(model, counts, schedule) == wanted

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.inference.engine.sampler import choose_tokens
from deepseek_v3.inference.sampling import (
    SamplingConfig,
    next_token_probabilities,
    penalized,
    request_seed,
    uniform_draws,
)
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import format_value
from helpers.requests import make_request

LOGITS_V = [1.0, -0.5, 2.0, 0.25, -3.0, 1.5]


def plain(**fields):
    return SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **fields})


def probabilities(logits_V, seen=(), dtype=torch.float64, **fields):
    """The distribution for one row, as a list."""
    logits_BV = torch.tensor([logits_V], dtype=dtype)
    seen_BV = torch.tensor([[id_ in seen for id_ in range(len(logits_V))]])
    sampling = plain(**fields)
    logits_BV = penalized(logits_BV, seen_BV, [sampling.repetition_penalty])
    return next_token_probabilities(logits_BV, [sampling])[0].tolist()


def chosen(logits_BV, samplings, prompts=None):
    """The tokens that a batch of requests chooses; request i has number i."""
    prompts = prompts or [[0]] * len(samplings)
    pairs = enumerate(zip(prompts, samplings, strict=True))
    return choose_tokens(logits_BV, [make_request(ids, sampling, index) for index, (ids, sampling) in pairs])


def brute_force(logits_V, seen=(), temperature=1.0, top_k=None, top_p=1.0, repetition_penalty=1.0, min_p=0.0):
    """The same distribution, step by step over a list."""
    theta = repetition_penalty
    scores = [(x / theta if x > 0 else x * theta) if i in seen else x for i, x in enumerate(logits_V)]
    weights = [math.exp((x - max(scores)) / temperature) for x in scores]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total = sum(weights[i] for i in order)
    nucleus, held = [], 0.0
    for i in order:
        if held >= top_p:
            break
        nucleus.append(i)
        held += weights[i] / total
    nucleus = [i for i in nucleus if weights[i] >= min_p * max(weights)]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_k": 4, "top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 0.3, "top_p": 0.9, "temperature": 2.0},
    {"repetition_penalty": 1.5, "seen": (2, 4)},
    {"repetition_penalty": 2.0, "seen": (0, 1, 2, 3, 4, 5), "temperature": 0.7, "top_k": 5, "top_p": 0.8},
]


@pytest.mark.parametrize("fields", CASES)
def test_the_distribution_is_that_of_the_steps_taken_one_by_one(fields):
    assert probabilities(LOGITS_V, **fields) == pytest.approx(brute_force(LOGITS_V, **fields), abs=1e-12)


@pytest.mark.parametrize("fields", CASES)
def test_samples_follow_the_distribution(fields):
    """Pearson's chi-square over 4000 requests with one seed, below its 99.9 % quantile."""
    expected = [4000 * p for p in brute_force(LOGITS_V, **fields)]
    seen = fields.get("seen", ())
    sampling = plain(**{name: value for name, value in fields.items() if name != "seen"})
    logits_BV = torch.tensor(LOGITS_V).expand(4000, -1)
    tokens_B = chosen(logits_BV, [sampling] * 4000, [list(seen)] * 4000).tokens_B
    counts = tokens_B.bincount(minlength=6).tolist()
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True) if e)
    quantile = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}  # by degrees of freedom
    assert statistic < quantile[sum(e > 0 for e in expected) - 1]


def test_draws_of_one_request_follow_the_distribution_too():
    draws_N = uniform_draws([request_seed(3, 0)] * 4000, range(4000))
    counts = torch.histc(draws_N, 16, 0, 1)
    assert ((counts - 250).square() / 250).sum() < 37.7  # the 99.9 % quantile for 15 degrees of freedom
    assert ((draws_N[1:] - 0.5) * (draws_N[:-1] - 0.5)).mean().abs() < 4 / 12 / math.sqrt(4000)


logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@given(logits_lists, st.integers(1, 45))
def test_top_k_keeps_the_most_probable_and_then_the_lowest_ids(logits_V, top_k):
    kept = [i for i, p in enumerate(probabilities(logits_V, top_k=top_k)) if p > 0]
    assert kept == sorted(sorted(range(len(logits_V)), key=lambda i: (-logits_V[i], i))[:top_k])


@given(logits_lists, st.floats(0.01, 1), st.floats(0.1, 5))
def test_top_p_keeps_the_fewest_that_hold_the_share(logits_V, top_p, temperature):
    whole = probabilities(logits_V, temperature=temperature)
    kept = probabilities(logits_V, temperature=temperature, top_p=top_p)
    nucleus = [i for i, p in enumerate(kept) if p > 0]
    held = sum(whole[i] for i in nucleus)
    assert sum(kept) == pytest.approx(1)
    assert held >= top_p - 1e-9
    assert held - min(whole[i] for i in nucleus) <= top_p + 1e-9
    assert min(whole[i] for i in nucleus) >= max((p for i, p in enumerate(whole) if i not in nucleus), default=0)


@given(logits_lists, st.floats(1.01, 100), st.data())
def test_a_penalty_never_makes_a_seen_token_more_probable(logits_V, penalty, data):
    seen = data.draw(st.integers(0, len(logits_V) - 1))
    before = probabilities(logits_V)[seen]
    assert probabilities(logits_V, seen=(seen,), repetition_penalty=penalty)[seen] <= before + 1e-12


def test_greedy_takes_the_lowest_of_equals_without_randomness():
    logits_BV = torch.tensor([[0.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    assert chosen(logits_BV, [plain(temperature=0.0)] * 2).tokens_B.tolist() == [1, 0]


def test_greedy_heeds_the_repetition_penalty():
    sampling = plain(temperature=0, repetition_penalty=2.0)
    assert chosen(torch.tensor([[1.0, 1.5]]), [sampling], [[1]]).tokens_B.item() == 0


def test_a_penalty_counts_the_tokens_that_were_chosen():
    request = make_request([0], plain(temperature=0, repetition_penalty=100.0))
    logits_BV = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert [choose_tokens(logits_BV, [request]).tokens_B.item() for _ in range(4)] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_probabilities_are_taken_in_float32_or_wider(given, computed):
    logits_BV = torch.randn(2, 5).to(given)
    before_BV = logits_BV.clone()
    sampling = plain(top_k=2, top_p=0.5, repetition_penalty=3.0)
    assert next_token_probabilities(logits_BV, [sampling] * 2).dtype == computed
    chosen(logits_BV, [sampling] * 2)
    assert torch.equal(logits_BV, before_BV)


def test_rounding_that_swaps_near_equals_changes_no_choice():
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, 0.5]]).expand(200, -1)
    nudged_BV = logits_BV + 1e-6 * torch.tensor([0.0, 1.0, -1.0, 1.0])
    assert torch.equal(*(chosen(x_BV, [plain()] * 200).tokens_B for x_BV in (logits_BV, nudged_BV)))


MIXED = [
    plain(temperature=0),
    plain(seed=3),
    plain(seed=4, top_p=0.6, temperature=0.7),
    plain(seed=5, top_k=7, min_p=0.01, logprobs=5),
    plain(temperature=0, repetition_penalty=2.0, logprobs=2),
    plain(seed=6, repetition_penalty=1.1, top_k=20, top_p=0.9),
]


def test_a_rows_choice_depends_on_its_own_request_alone():
    """Each kind of sampling alone, and in batches of all kinds in any order, to the last bit."""
    logits_BV = torch.randn(6, 501, generator=torch.Generator().manual_seed(0))
    orders = [[index] for index in range(6)], [[0, 1, 2, 3, 4, 5]], [[4, 2, 0], [5, 3, 1]]
    found = []
    for order in orders:
        tokens, logprobs = {}, {}
        for batch in order:
            requests = [make_request([index, 50], MIXED[index], index) for index in batch]
            choice = choose_tokens(logits_BV[batch], requests)
            tokens |= dict(zip(batch, choice.tokens_B.tolist(), strict=True))
            for row, index in enumerate(batch):
                if (number := MIXED[index].logprobs) is not None:
                    logprobs[index] = [values[row].flatten()[:number].tolist() for values in choice.logprobs]
        found.append((tokens, logprobs))
    assert found[0] == found[1] == found[2]


def test_log_probabilities_are_those_of_the_model_itself():
    logits_BV = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    sampling = plain(temperature=0, repetition_penalty=100.0, logprobs=2)
    choice = chosen(logits_BV, [sampling], [[1]])
    assert choice.tokens_B.tolist() == [2]
    logprob_B, ids_BN, values_BN = choice.logprobs
    wanted_V = logits_BV[0].log_softmax(-1)
    assert ids_BN.tolist() == [[1, 2]]
    assert torch.equal(logprob_B, wanted_V[[2]])
    assert torch.equal(values_BN[0], wanted_V[[1, 2]])


def test_draws_differ_by_seed_by_request_and_by_position():
    seeds = [request_seed(seed, index) for seed in (0, 1, 2**40, 10**30) for index in range(3)]
    assert len({draw for seed in seeds for draw in uniform_draws([seed] * 4, range(4)).tolist()}) == 48


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_marked(bad, temperature):
    logits_BV = torch.tensor([[0.0, bad], [0.0, 50.0]])
    assert chosen(logits_BV, [plain(temperature=temperature)] * 2).tokens_B.tolist() == [-1, 1]


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_extremes_allowed_stay_finite(temperature, penalty):
    values = probabilities(
        [1e4, -1e4, 0.0], (0, 1), torch.float32, temperature=temperature, repetition_penalty=penalty
    )
    assert sum(values) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-7),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", None),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_k", True),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101),
        ("seed", -1),
        ("seed", 0.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", None),
        ("stop", "end"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("stop_tokens", (-1,)),
        ("stop_tokens", [3]),
        ("logprobs", 101),
        ("logprobs", True),
    ],
)
def test_what_a_field_cannot_mean_is_refused_by_name(field, value):
    with pytest.raises(GenerationError) as caught:
        SamplingConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} = {format_value(value)}: expected ")


def test_the_limits_themselves_are_allowed():
    SamplingConfig(temperature=0, top_p=1, top_k=1, repetition_penalty=100, seed=0, max_new_tokens=1, stop=("a",))

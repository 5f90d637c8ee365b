import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.inference.sampling import SamplingConfig, choose_next, next_token_probabilities, row_generator
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.text import format_value

LOGITS_V = [1.0, -0.5, 2.0, 0.25, -3.0, 1.5]


def plain(**fields):
    return SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **fields})


def probabilities(logits_V, seen=(), dtype=torch.float64, **fields):
    """The distribution for one row, as a list."""
    logits_BV = torch.tensor([logits_V], dtype=dtype)
    seen_BV = torch.tensor([[id_ in seen for id_ in range(len(logits_V))]])
    return next_token_probabilities(logits_BV, seen_BV, plain(**fields))[0].tolist()


def brute_force(logits_V, seen=(), temperature=1.0, top_k=None, top_p=1.0, repetition_penalty=1.0):
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
    {"repetition_penalty": 1.5, "seen": (2, 4)},
    {"repetition_penalty": 2.0, "seen": (0, 1, 2, 3, 4, 5), "temperature": 0.7, "top_k": 5, "top_p": 0.8},
]


@pytest.mark.parametrize("fields", CASES)
def test_the_distribution_is_that_of_the_steps_taken_one_by_one(fields):
    assert probabilities(LOGITS_V, **fields) == pytest.approx(brute_force(LOGITS_V, **fields), abs=1e-12)


@pytest.mark.parametrize("fields", CASES)
def test_samples_follow_the_distribution(fields):
    """Pearson's chi-square over 4000 rows, each with its own generator, below its 99.9 % quantile."""
    expected = [4000 * p for p in brute_force(LOGITS_V, **fields)]
    seen = fields.get("seen", ())
    sampling = plain(**{name: value for name, value in fields.items() if name != "seen"})
    logits_BV = torch.tensor(LOGITS_V).expand(4000, -1)
    seen_BV = torch.tensor([id_ in seen for id_ in range(6)]).expand(4000, -1)
    tokens_B = choose_next(logits_BV, seen_BV, sampling, [row_generator(0, index) for index in range(4000)])
    counts = tokens_B.bincount(minlength=6).tolist()
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True) if e)
    quantile = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}  # by degrees of freedom
    assert statistic < quantile[sum(e > 0 for e in expected) - 1]


def test_draws_of_one_row_follow_the_distribution_too():
    generator, draws = row_generator(3, 0), []
    logits_BV, seen_BV = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2, dtype=torch.bool)
    for _ in range(2000):
        draws.append(choose_next(logits_BV, seen_BV, plain(), [generator]).item())
    assert (sum(draws) - 1500) ** 2 / 1500 + (sum(draws) - 1500) ** 2 / 500 < 10.83


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
    tokens_B = choose_next(logits_BV, torch.zeros(2, 3, dtype=torch.bool), plain(temperature=0.0), [])
    assert tokens_B.tolist() == [1, 0]


def test_greedy_heeds_the_repetition_penalty():
    logits_BV, seen_BV = torch.tensor([[1.0, 1.5]]), torch.tensor([[False, True]])
    assert choose_next(logits_BV, seen_BV, plain(temperature=0, repetition_penalty=2.0), []).item() == 0


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
    logits_BV, seen_BV = torch.randn(2, 5).to(given), torch.ones(2, 5, dtype=torch.bool)
    before_BV = logits_BV.clone()
    sampling = plain(top_k=2, top_p=0.5, repetition_penalty=3.0)
    assert next_token_probabilities(logits_BV, seen_BV, sampling).dtype == computed
    assert torch.equal(logits_BV, before_BV)


def test_rounding_that_swaps_near_equals_changes_no_choice():
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, 0.5]]).expand(200, -1)
    nudged_BV = logits_BV + 1e-6 * torch.tensor([0.0, 1.0, -1.0, 1.0])
    seen_BV = torch.zeros(200, 4, dtype=torch.bool)
    chosen = [
        choose_next(x_BV, seen_BV, plain(), [row_generator(1, index) for index in range(200)])
        for x_BV in (logits_BV, nudged_BV)
    ]
    assert torch.equal(*chosen)


def test_a_rows_choice_depends_on_its_own_generator_alone():
    logits_BV, seen_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 50) > 0
    together_B = choose_next(logits_BV, seen_BV, plain(), [row_generator(5, index) for index in range(4)])
    alone = [choose_next(logits_BV[[i]], seen_BV[[i]], plain(), [row_generator(5, i)]).item() for i in range(4)]
    assert together_B.tolist() == alone


def test_generators_differ_by_seed_and_by_index():
    draws = {row_generator(seed, index).random() for seed in (0, 1, 2**40) for index in range(3)}
    assert len(draws) == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits_BV = torch.tensor([[0.0, bad]])
    with pytest.raises(GenerationError, match="NaN or infinite"):
        choose_next(logits_BV, torch.zeros(1, 2) > 0, plain(temperature=temperature), [row_generator(0, 0)])


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
    ],
)
def test_what_a_field_cannot_mean_is_refused_by_name(field, value):
    with pytest.raises(GenerationError) as caught:
        SamplingConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} = {format_value(value)}: expected ")


def test_the_limits_themselves_are_allowed():
    SamplingConfig(temperature=0, top_p=1, top_k=1, repetition_penalty=100, seed=0, max_new_tokens=1, stop=("a",))

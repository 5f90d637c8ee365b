"""The planned steps of a run, compared with counting them one by one."""

import math
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.filter_config import MixingConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.request import parse_tokens
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_steps, planned_tokens, sample_boundaries
from deepseek_v3.utils.errors import ConfigError
from helpers.runs import run_fields


def _run(micro_batch_size: int = 1, **training: object) -> RunConfig:
    fields = run_fields(Path("run"))
    fields["training"].update(training)
    fields["parallel"]["micro_batch_size"] = micro_batch_size
    return RunConfig.model_validate(fields, strict=False)


def test_a_budget_is_a_number_or_a_multiple() -> None:
    active = count_active_parameters(_run().model)
    assert budget_in_tokens(_run(total_tokens=123)) == 123
    assert budget_in_tokens(_run(total_tokens="20x")) == 20 * active
    assert budget_in_tokens(_run(total_tokens="2.5x")) == round(2.5 * active)
    assert budget_in_tokens(_run(total_tokens="19.37x")) == round(Decimal("19.37") * active)


@pytest.mark.parametrize("text", ["3.8e9", "3.8B", "3_800_000_000", "3,800,000,000", "3800M"])
def test_tokens_are_written_alike_everywhere(text: str) -> None:
    assert budget_in_tokens(_run(total_tokens=text)) == 3_800_000_000
    assert MixingConfig.model_validate({"tokens": text}).tokens == 3_800_000_000
    assert parse_tokens(text) == 3_800_000_000


@pytest.mark.parametrize("text", ["0", "1e19", "1.5", "3,8e9", "many"])
def test_impossible_tokens_are_refused_everywhere(text: str) -> None:
    with pytest.raises(ValueError, match="total_tokens"):
        _run(total_tokens=text)
    with pytest.raises(ValueError, match="tokens"):
        MixingConfig.model_validate({"tokens": text})
    with pytest.raises(ConfigError, match="--tokens"):
        parse_tokens(text)


@given(total=st.integers(1, 20_000), batch=st.integers(1, 12), length=st.integers(2, 64))
def test_steps_of_a_constant_batch_are_those_of_counting(total: int, batch: int, length: int) -> None:
    config = _run(total_tokens=total, global_batch_size=batch, sequence_length=length)
    steps = tokens = 0
    while tokens < total:
        steps, tokens = steps + 1, tokens + batch * length
    assert (planned_steps(config), planned_tokens(config)) == (steps, tokens)
    assert list(sample_boundaries(config)) == [batch * step for step in range(steps + 1)]


@given(
    total=st.integers(1, 50_000),
    initial=st.integers(1, 6),
    more=st.integers(0, 20),
    micro=st.integers(1, 4),
    length=st.integers(2, 64),
    fraction=st.floats(0.01, 1),
)
def test_a_ramp_is_linear_and_ends_at_the_budget(
    total: int, initial: int, more: int, micro: int, length: int, fraction: float
) -> None:
    first, last = initial * micro, (initial + more) * micro
    config = _run(
        micro,
        total_tokens=total,
        sequence_length=length,
        global_batch_size=last,
        batch_ramp={"initial": first, "fraction": fraction},
    )
    borders = list(sample_boundaries(config))
    sizes = [end - start for start, end in pairwise(borders)]
    assert borders[0] == 0
    assert borders[-1] * length >= total > borders[-2] * length
    assert (planned_steps(config), planned_tokens(config)) == (len(sizes), borders[-1] * length)
    for start, size in zip(borders, sizes, strict=False):
        share = start / math.ceil(total / length)
        exact = first + (last - first) * min(1, share / fraction)
        unit = math.gcd(first, last)
        assert size % unit == 0
        assert abs(size - exact) <= unit / 2 + 1e-6


def test_the_steps_of_a_ramp_are_the_same_under_every_layout() -> None:
    fields = {
        "total_tokens": 40_000,
        "sequence_length": 16,
        "global_batch_size": 48,
        "batch_ramp": {"initial": 16, "fraction": 0.6},
    }
    borders = [list(sample_boundaries(_run(micro, **fields))) for micro in (1, 2, 4, 8, 16)]
    assert all(each == borders[0] for each in borders)


def test_a_constant_batch_needs_no_list_of_its_steps() -> None:
    config = _run(total_tokens=10**18, global_batch_size=1000, sequence_length=50)
    assert planned_steps(config) == 2 * 10**13
    assert planned_tokens(config) == 10**18


def test_a_long_run_is_planned_by_batch_sizes_alone() -> None:
    ramp = {"initial": 2, "fraction": 0.25, "increment": 1}
    config = _run(total_tokens=10**15, global_batch_size=4, sequence_length=50, batch_ramp=ramp)
    borders = sample_boundaries(config)
    assert len(borders) == planned_steps(config) + 1 > 10**12
    assert borders[-1] - borders[-2] == 4
    assert borders[:3] == [0, 2, 4]
    assert borders[-1] * 50 == planned_tokens(config) >= 10**15 > borders[-2] * 50
    with pytest.raises(IndexError):
        borders[len(borders)]


def test_a_ramp_of_too_many_sizes_is_refused() -> None:
    ramp = {"initial": 1, "fraction": 1.0}
    config = _run(total_tokens=10**18, global_batch_size=2**24, sequence_length=2, batch_ramp=ramp)
    with pytest.raises(ConfigError, match="the batch grows through more than 50,000 sizes"):
        planned_steps(config)


def test_the_report_s_ramp_has_the_steps_of_its_integral() -> None:
    config = _run(
        total_tokens=14_800_000_000_000,
        sequence_length=50,
        global_batch_size=15360 * 4096 // 50,
        batch_ramp={"initial": 3072 * 4096 // 50, "fraction": 469 / 14800},
    )
    # d(steps) = d(tokens) / batch(tokens): a logarithm while the batch grows linearly.
    growing = 469e9 / ((15360 - 3072) * 4096) * math.log(15360 / 3072)
    constant = (14.8e12 - 469e9) / (15360 * 4096)
    assert planned_steps(config) == pytest.approx(growing + constant, rel=1e-3)

"""The run's plan against the report's own figures and against brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.train_config import RunConfig, ScheduleConfig
from deepseek_v3.training.schedule import TrainingSchedule, learning_rate_ratio
from helpers.models import small_config

PEAK = 2.2e-4
TOTAL = 14.8e12


def _run(**training: object) -> RunConfig:
    micro_batch_size = training.pop("micro_batch_size", 1)
    recipe = {
        "total_tokens": 10_000,
        "sequence_length": 16,
        "global_batch_size": 8,
        "optimizer": {"learning_rate": PEAK},
        "schedule": {"warmup_steps": 5},
        **training,
    }
    return RunConfig.model_validate(
        {
            "model": small_config(),
            "training": recipe,
            "parallel": {"micro_batch_size": micro_batch_size},
            "data": {"path": "tokens"},
            "logging": {"directory": "run"},
        },
        strict=False,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0.0, 2.2e-4),
        (9.99e12, 2.2e-4),
        (10e12 + 4.3e12 / 2, (2.2e-4 + 2.2e-5) / 2),
        (14.31e12, 2.2e-5),
        (14.63e12, 2.2e-5),
        (14.64e12, 7.3e-6),
        (14.8e12, 7.3e-6),
    ],
)
def test_learning_rate_at_the_dates_of_the_report(tokens: float, expected: float) -> None:
    ratio = learning_rate_ratio(ScheduleConfig(warmup_steps=2000), 10_000, tokens / TOTAL)
    assert PEAK * ratio == pytest.approx(expected, rel=1e-6)


def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    schedule = ScheduleConfig(warmup_steps=2000)
    assert learning_rate_ratio(schedule, 1, 0.0) == 1 / 2000
    assert learning_rate_ratio(schedule, 1000, 0.0) == 0.5
    assert learning_rate_ratio(schedule, 2000, 0.0) == 1.0
    assert learning_rate_ratio(ScheduleConfig(warmup_steps=0), 1, 0.0) == 1.0


def test_cosine_and_wsd_end_at_their_final_ratio() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_steps=0, final_ratio=0.1)
    assert learning_rate_ratio(cosine, 1, 0.5) == pytest.approx(0.55)
    assert learning_rate_ratio(cosine, 1, 1.0) == pytest.approx(0.1)
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=0.2, final_ratio=0.0)
    assert learning_rate_ratio(wsd, 1, 0.79) == 1.0
    assert learning_rate_ratio(wsd, 1, 0.9) == pytest.approx(0.5)
    assert learning_rate_ratio(wsd, 1, 1.0) == pytest.approx(0.0)


def test_mtp_weight_and_bias_speed_change_once_when_due() -> None:
    plan = TrainingSchedule(_run(total_tokens=16 * 8 * 1000))
    steps = [plan.step(number) for number in range(1, 1001)]
    switch = math.ceil(1000 * 10 / 14.8)
    assert [step.mtp_weight for step in steps] == [0.3] * switch + [0.1] * (1000 - switch)
    rest = math.ceil(1000 * 14.3 / 14.8)
    assert [step.bias_update_speed for step in steps] == [1e-3] * rest + [0.0] * (1000 - rest)


@given(
    total=st.integers(1, 50_000),
    initial=st.integers(1, 4),
    final=st.integers(4, 12),
    micro=st.integers(1, 4),
    fraction=st.floats(0.01, 1),
)
def test_each_sample_is_planned_once_within_the_budget(
    total: int, initial: int, final: int, micro: int, fraction: float
) -> None:
    initial, final = initial * micro, final * micro
    plan = TrainingSchedule(
        _run(
            total_tokens=total,
            global_batch_size=final,
            batch_ramp={"initial": initial, "fraction": fraction},
            micro_batch_size=micro,
        )
    )
    steps = [plan.step(number) for number in range(1, plan.total_steps + 1)]
    next_sample = 0
    for step in steps:
        batches = plan.micro_batches(step, micro)
        assert all(size == micro for _, size in batches)
        assert sum(size for _, size in batches) == step.num_samples
        assert batches[0][0] == step.first_sample == next_sample
        next_sample += step.num_samples
        assert plan.tokens_after(step.number) == next_sample * 16
    sizes = [step.num_samples for step in steps]
    assert sizes == sorted(sizes)
    assert min(sizes) >= micro
    assert max(sizes) <= final
    assert plan.tokens_after(plan.total_steps) >= total > plan.tokens_after(plan.total_steps - 1)

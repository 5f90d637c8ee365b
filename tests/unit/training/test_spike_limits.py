"""The limits above which a step is a spike."""

import math

import pytest

from deepseek_v3.config.train_config import SpikeConfig
from deepseek_v3.training.optimizer import NO_LIMITS, StepLimits
from deepseek_v3.training.spikes import SpikeDetector, limits_from_json, limits_to_json, upper_limit


def test_the_limit_is_the_median_plus_robust_deviations() -> None:
    """The median is 3, and the distances from it are 2, 1, 0, 1, 97: one wild value does not move the limit."""
    assert upper_limit([1, 2, 3, 4, 100], 10) == pytest.approx(3 + 10 * 1.4826)


def test_the_deviation_is_at_least_a_percent_of_the_median() -> None:
    assert upper_limit([2.0] * 5, 10) == pytest.approx(2.2)


def test_nothing_is_a_spike_until_the_window_is_full() -> None:
    detector = SpikeDetector(SpikeConfig(window=4, loss_threshold=10, norm_threshold=20))
    for _ in range(3):
        detector.add(2.0, 1.0)
        assert detector.limits() == NO_LIMITS
    detector.add(2.0, 1.0)
    assert detector.limits() == pytest.approx((2.2, 1.2))


def test_the_window_forgets_old_steps_and_is_restored() -> None:
    config = SpikeConfig(window=4)
    detector = SpikeDetector(config, [(loss, 1.0) for loss in (9.0, 9.0, 9.0, 2.0)])
    for loss in (2.1, 2.2, 2.3):
        detector.add(loss, 1.0)
    assert [loss for loss, _ in detector.state()] == [2.0, 2.1, 2.2, 2.3]
    again = SpikeDetector(config, [(loss, norm) for loss, norm in detector.state()])
    assert again.limits() == detector.limits()


def test_ignore_sets_no_limits() -> None:
    detector = SpikeDetector(SpikeConfig(window=4, action="ignore"), [(2.0, 1.0)] * 4)
    assert detector.limits() == NO_LIMITS


@pytest.mark.parametrize("limits", [NO_LIMITS, StepLimits(2.5, 0.1), StepLimits(math.inf, 3.0)])
def test_limits_survive_json(limits: StepLimits) -> None:
    assert limits_from_json(limits_to_json(limits)) == limits

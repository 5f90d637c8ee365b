"""Scaling laws compared with the figures of their papers, and the documentation with the code."""

import math
from collections.abc import Callable

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.scaling_laws import (
    ExpectedLoss,
    dense_loss,
    expansion,
    expected_loss,
    joint_loss,
    suggested_batch_tokens,
    suggested_learning_rate,
    training_compute,
)
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_steps
from helpers import ROOT
from helpers.models import small_config

SIZES = "tiny 1b 5b 10b 15b 20b base".split()
ENDLESS = 1e300  # tokens or parameters, whose term then vanishes


def _config(size: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"deepseek_v3_{size}.yaml")


def _expected(size: str) -> ExpectedLoss:
    config = _config(size)
    return expected_loss(config.model, budget_in_tokens(config))


def _optimum(loss: Callable[[float, float], float], compute: float) -> tuple[float, float]:
    """The parameters and tokens with the lowest loss at a compute of 6·N·D, by brute force."""
    sizes = (math.exp(step / 1000) for step in range(9_000, 30_000))
    best = min(sizes, key=lambda size: loss(size, compute / 6 / size))
    return best, compute / 6 / best


@pytest.mark.parametrize(
    ("experts", "m", "mu", "n", "nu"),
    [
        (1, 30.3640, -0.1817, 53.9838, -0.1965),
        (2, 27.7982, -0.1780, 66.8401, -0.2065),
        (4, 24.8462, -0.1731, 87.7022, -0.2192),
        (8, 21.8330, -0.1676, 119.9126, -0.2338),
        (16, 19.0159, -0.1617, 167.5073, -0.2494),
        (32, 16.5424, -0.1557, 234.6726, -0.2652),
    ],
)
def test_the_joint_law_matches_its_paper(experts: float, m: float, mu: float, n: float, nu: float) -> None:
    """arXiv:2502.05172, table 4: L = m·N^µ + n·D^ν + 1.3637."""
    for size in (1.0, 1e9):
        assert joint_loss(size, ENDLESS, experts) - 1.3637 == pytest.approx(m * size**mu, rel=4e-3)
        assert joint_loss(ENDLESS, size, experts) - 1.3637 == pytest.approx(n * size**nu, rel=4e-3)


@pytest.mark.parametrize(
    ("compute", "experts", "parameters", "tokens"),
    [(1e20, 1, 1.7e9, 9.7e9), (1e20, 32, 669e6, 24.9e9), (1e21, 8, 3.8e9, 44.3e9), (1e22, 4, 15.8e9, 105.4e9)],
)
def test_the_joint_law_s_optima_are_its_paper_s(
    compute: float, experts: float, parameters: float, tokens: float
) -> None:
    """arXiv:2502.05172, table 1."""
    best = _optimum(lambda size, seen: joint_loss(size, seen, experts), compute)
    assert best == pytest.approx((parameters, tokens), rel=0.03)


def test_the_dense_law_scales_parameters_and_tokens_alike() -> None:
    """arXiv:2404.10102: the optimal size grows with the compute to the power 0.5126, and the ratio is about 20."""
    (small, _), (large, tokens) = (_optimum(dense_loss, compute) for compute in (5.76e21, 5.76e23))
    assert math.log(large / small) / math.log(100) == pytest.approx(0.5126, abs=1e-3)
    assert 18 < tokens / large < 22


def test_expansion_is_the_ratio_of_expert_widths() -> None:
    assert expansion(_config("base").model) == (256 + 1) / (8 + 1)
    assert expansion(small_config(n_shared_experts=0, n_routed_experts=8, num_experts_per_tok=2)) == 4
    assert expansion(small_config(first_k_dense_replace=3)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_the_error_bar_spans_its_laws(size: str) -> None:
    config = _config(size)
    tokens = budget_in_tokens(config)
    expected = expected_loss(config.model, tokens)
    active, total = count_active_parameters(config.model), count_parameters(config.model).total
    for estimate in (expected.value, dense_loss(active, tokens), dense_loss(total, tokens)):
        assert expected.low <= estimate - 0.03 + 1e-12
        assert expected.high >= estimate + 0.03 - 1e-12
    assert expected_loss(config.model, 2 * tokens).value < expected.value


def test_losses_outside_the_fitted_models_say_so() -> None:
    inside = {size: not _expected(size).extrapolated for size in SIZES}
    assert inside == {"1b": True, "5b": True} | dict.fromkeys(["tiny", "10b", "15b", "20b", "base"], False)
    assert expected_loss(_config("1b").model, 1e12).extrapolated
    assert expected_loss(_config("1b").model, 1e6).extrapolated


@pytest.mark.parametrize(
    ("layers", "width", "learning_rate", "sequences"), [(30, 4096, 4.2e-4, 2304), (95, 8192, 3.2e-4, 4608)]
)
def test_hyperparameters_are_near_those_of_known_models(
    layers: int, width: int, learning_rate: float, sequences: int
) -> None:
    """DeepSeek LLM 7B and 67B (arXiv:2401.02954, table 2), 2T tokens; operations per token by its equation 2."""
    compute = (72 * layers * width**2 + 12 * layers * width * 4096) * 2e12
    assert suggested_learning_rate(compute) == pytest.approx(learning_rate, rel=0.05)
    assert suggested_batch_tokens(compute) == pytest.approx(sequences * 4096, rel=0.1)


@pytest.mark.parametrize("size", ["1b", "5b", "10b", "15b", "20b"])
def test_the_shipped_learning_rates_follow_the_law(size: str) -> None:
    config = _config(size)
    compute = 6 * count_active_parameters(config.model) * budget_in_tokens(config)
    assert config.training.optimizer.learning_rate == pytest.approx(suggested_learning_rate(compute), rel=0.05)


def test_the_published_model_keeps_its_published_learning_rate() -> None:
    assert _config("base").training.optimizer.learning_rate == 2.2e-4


@pytest.mark.parametrize("size", SIZES)
def test_the_documentation_prints_what_the_code_computes(size: str) -> None:
    document = (ROOT / "docs" / "CHINCHILLA_SCALING.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines()]
    steps_row, ratio_row, loss_row, batch_row = ([*row[1:]] for row in rows if row[0] == size)
    config, expected = _config(size), _expected(size)
    training, tokens = config.training, budget_in_tokens(config)
    batch, compute = training.global_batch_size * training.sequence_length, training_compute(config.model, tokens)
    assert steps_row[3:5] == [f"{batch:,}", f"{planned_steps(config):,}"]
    best, seen = _optimum(dense_loss, compute)
    assert float(steps_row[5]) == pytest.approx(seen / best, abs=0.1)
    best, seen = _optimum(lambda n, d: joint_loss(n, d, expansion(config.model)), compute)
    assert float(steps_row[6]) == pytest.approx(seen / best, abs=0.15)
    counts, active = count_parameters(config.model), count_active_parameters(config.model)
    head = config.model.vocab_size * config.model.hidden_size
    sizes = (active, active - head, active + counts.embedding, counts.total)
    assert ratio_row == [f"{tokens / parameters:.1f}" for parameters in sizes]
    bar = f"{expected.low:.3f} to {expected.high:.3f}"
    assert loss_row[1:] == [f"{expected.value:.3f}", bar, "yes" if expected.extrapolated else "no"]
    law = suggested_batch_tokens(compute)
    rates = [f"{suggested_learning_rate(compute):.2e}", f"{training.optimizer.learning_rate:.2e}"]
    assert batch_row == [f"{compute:.2e}", *rates, f"{law:,.0f}", f"{batch:,}", f"{batch / law:.2f}"]

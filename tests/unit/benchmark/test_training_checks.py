"""What decides whether a speed may be shown: each check finds the fault that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_v3.benchmark.ceilings import Ceilings
from deepseek_v3.benchmark.own_training import TrainingFigures
from deepseek_v3.benchmark.shape_files import run_config, shape_names
from deepseek_v3.benchmark.step_floor import step_floor
from deepseek_v3.benchmark.training_checks import check_run, compare_steps, failures, random_loss
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from helpers.models import small_config

EXPERTS, ATTENTION = "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def gradients() -> dict[str, Tensor]:
    return {EXPERTS: torch.randn(4, 8, 8), ATTENTION: torch.randn(8, 8)}


def found_by(gradients: dict[str, Tensor], changed: dict[str, Tensor], loss: float = 2.0) -> list[str]:
    return failures(compare_steps((loss, changed), (2.0, gradients), "bf16"))


def test_equal_steps_pass(gradients: dict[str, Tensor]) -> None:
    assert found_by(gradients, gradients) == []


def test_one_number_that_is_not_finite_is_found(gradients: dict[str, Tensor]) -> None:
    broken = {**gradients, ATTENTION: gradients[ATTENTION].clone()}
    broken[ATTENTION][3, 3] = torch.nan
    assert "gradients that are not finite: 1, expected at most 0" in found_by(gradients, broken)[0]


def test_a_part_with_other_gradients_is_named(gradients: dict[str, Tensor]) -> None:
    (message,) = found_by(gradients, {**gradients, EXPERTS: gradients[EXPERTS].flip(0) * 1.0})[:1]
    assert "cosine of the gradients (routed experts)" in message


def test_routers_have_a_bound_of_their_own(gradients: dict[str, Tensor]) -> None:
    """Noise of 0.4 of the gradient is no more than rounding causes there; another gradient is."""
    router = "model.layers.1.mlp.gate.weight"
    true, noise = torch.randn(2, 4000, dtype=torch.float64)
    gradients[router] = true
    assert found_by(gradients, {**gradients, router: (true + 0.4 * noise) / 1.16**0.5}) == []
    (message,) = found_by(gradients, {**gradients, router: noise})[:1]
    assert "cosine of the gradients (routers)" in message


def test_a_gradient_of_zeros_is_found(gradients: dict[str, Tensor]) -> None:
    messages = found_by(gradients, {**gradients, EXPERTS: torch.zeros(4, 8, 8)})
    assert "cosine of the gradients (routed experts): 0, expected at least 0.95" in messages[0]


def test_a_wrong_scale_is_found(gradients: dict[str, Tensor]) -> None:
    (message,) = found_by(gradients, {**gradients, ATTENTION: 1.1 * gradients[ATTENTION]})
    assert "relative difference of the norms (attention): 0.1, expected at most 0.02" in message


def test_another_loss_is_found(gradients: dict[str, Tensor]) -> None:
    (message,) = found_by(gradients, gradients, loss=2.1)
    assert "relative difference of the loss: 0.05, expected at most 0.002" in message


def test_a_run_must_stay_finite_and_learn(tmp_path: Path) -> None:
    config = run_config("1b", tmp_path, 10, None, "bf16", [])
    start = random_loss(config.model)

    def problems(losses: dict[int, float | None], norm: float | None = 1.0) -> list[str]:
        return failures(check_run(config, TrainingFigures((1.0,), 0.0, 1.0, losses, {1: norm}), start))

    assert problems({1: start, 10: start - 1}) == []
    assert problems({1: start, 10: start + 1}) == [
        "fall of the loss from the first to the last step: -1, expected at least 0"
    ]
    assert "not finite: 1" in problems({1: start, 10: start - 1}, norm=None)[0]
    assert len(problems({1: None, 10: start})) == 4


def test_random_weights_have_the_expected_loss() -> None:
    """Against the mean over random logits of unit states."""
    config = small_config(vocab_size=512, hidden_size=256, initializer_range=0.04)
    head = config.initializer_range * torch.randn(512, 256, dtype=torch.float64)
    states = torch.nn.functional.rms_norm(torch.randn(2000, 256, dtype=torch.float64), (256,))
    logits = states @ head.T
    found = (logits.logsumexp(-1) - logits[:, 0]).mean()
    assert random_loss(config) == pytest.approx(found.item(), abs=0.05)


@pytest.mark.parametrize("shape", shape_names())
def test_the_floor_is_that_of_its_parts(shape: str, tmp_path: Path) -> None:
    """At equal rates all operations count once; FP8 speeds up what it multiplies and nothing else."""
    config = run_config(shape, tmp_path, 10, None, "bf16", [])
    operations = config.tokens_per_step * training_flops_per_token(config.model, config.training.sequence_length)
    plain = step_floor(config, Ceilings(500.0, 1000.0, 4000.0), in_fp8=False)
    assert plain.products + plain.attention_and_head == pytest.approx(operations / 500e12)
    narrow = step_floor(config, Ceilings(500.0, 1000.0, 4000.0), in_fp8=True)
    assert narrow.products == pytest.approx(plain.products / 2)
    assert (narrow.attention_and_head, narrow.bytes_moved) == (plain.attention_and_head, plain.bytes_moved)
    weights = count_parameters(config.model).total
    assert plain.memory_bytes == 12 * weights
    assert plain.bytes_moved > 28 * weights / 4e12
    assert (
        step_floor(config, Ceilings(500.0, None, 4000.0), in_fp8=False, weight_bytes=2).memory_bytes == 8 * weights
    )


def test_the_published_rate_has_the_published_flops(tmp_path: Path) -> None:
    """38,713 tokens/s of the slice are 492 TFLOP/s by the convention of the comparison."""
    config = run_config("v3slice", tmp_path, 10, None, "bf16", [])
    flops = training_flops_per_token(config.model, config.training.sequence_length)
    assert 38_713 * flops == pytest.approx(492e12, rel=2e-3)

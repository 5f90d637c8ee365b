"""Normalisation, gated activation and rotary embedding against their formulas in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.ops.layers import Linear, RMSNorm
from deepseek_v3.ops.rms_norm import rms_norm
from deepseek_v3.ops.rotary import rotate
from deepseek_v3.ops.swiglu import swiglu
from helpers.models import largest_difference

EXACT = 1e-12
EPS = 1e-6


def share_rounded_once(found: Tensor, exact: Tensor) -> float:
    """The share of numbers that equal the exact result rounded once to the type of `found`."""
    return (found == exact.to(found.dtype)).double().mean().item()


def plain_rms_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return torch.stack([row / (row.pow(2).sum() / len(row) + EPS).sqrt() * weight_D for row in x])


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def turned_as_complex_numbers(x_BSHR: Tensor, angles_BSP: Tensor) -> Tensor:
    pairs_BSHP = torch.view_as_complex(x_BSHR.unflatten(-1, (-1, 2)))
    turns_BSHP = torch.polar(torch.ones_like(angles_BSP), angles_BSP)[:, :, None]
    return torch.view_as_real(pairs_BSHP * turns_BSHP).flatten(-2)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_taken_in_float32_at_least(narrow: torch.dtype, wide: torch.dtype) -> None:
    assert at_least_float32(torch.zeros(1, dtype=narrow)).dtype == wide


def test_rms_norm_is_its_formula() -> None:
    x, weight_D = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    assert largest_difference(rms_norm(x, weight_D, EPS), plain_rms_norm(x, weight_D)) < EXACT


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), EPS), torch.zeros(2, 4))


def test_rms_norm_rounds_once() -> None:
    x, weight_D = (3 * torch.randn(64, 128)).bfloat16(), torch.randn(128)
    found = rms_norm(x, weight_D, EPS)
    assert found.dtype == torch.bfloat16
    assert share_rounded_once(found, plain_rms_norm(x.double(), weight_D.double())) > 0.999


def test_rms_norm_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight_D = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rms_norm, (x, weight_D, EPS))


def test_swiglu_is_its_formula() -> None:
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64)
    weight = torch.randn(5, 1, dtype=torch.float64)
    assert largest_difference(swiglu(gate, up), plain_swiglu(gate, up)) < EXACT
    assert largest_difference(swiglu(gate, up, weight), plain_swiglu(gate, up) * weight) < EXACT


def test_swiglu_rounds_once_also_with_a_weight() -> None:
    gate, up = torch.randn(2, 64, 128).bfloat16()
    weight = torch.rand(64, 1)
    found = swiglu(gate, up, weight)
    assert found.dtype == torch.bfloat16
    assert share_rounded_once(found, plain_swiglu(gate.double(), up.double()) * weight.double()) > 0.999


def test_swiglu_gradients() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(swiglu, (gate, up, weight))


def test_rotation_is_complex_multiplication_of_adjacent_pairs() -> None:
    x_BSHR = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angles_BSP = 10 * torch.randn(2, 5, 4, dtype=torch.float64)
    found = rotate(x_BSHR, angles_BSP.cos(), angles_BSP.sin())
    assert largest_difference(found, turned_as_complex_numbers(x_BSHR, angles_BSP)) < EXACT


def test_one_table_serves_every_sequence_of_the_batch() -> None:
    x_BSHR = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angles_1SP = torch.randn(1, 5, 4, dtype=torch.float64)
    found = rotate(x_BSHR, angles_1SP.cos(), angles_1SP.sin())
    assert largest_difference(found, turned_as_complex_numbers(x_BSHR, angles_1SP)) < EXACT


def test_rotation_rounds_once() -> None:
    x_BSHR = torch.randn(2, 64, 4, 16).bfloat16()
    angles_BSP = torch.randn(2, 64, 8)
    found = rotate(x_BSHR, angles_BSP.cos(), angles_BSP.sin())
    assert found.dtype == torch.bfloat16
    assert share_rounded_once(found, turned_as_complex_numbers(x_BSHR.double(), angles_BSP.double())) > 0.999


def test_rotation_gradients() -> None:
    x_BSHR = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    angles_BSP = torch.randn(1, 3, 2, dtype=torch.float64)
    assert gradcheck(rotate, (x_BSHR, angles_BSP.cos(), angles_BSP.sin()))


def test_weights_are_converted_to_the_activations_type() -> None:
    linear, norm = Linear(4, 3), RMSNorm(3, EPS)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 4)

    found = norm(linear(x.bfloat16()))

    assert found.dtype == torch.bfloat16
    assert linear.weight.dtype == torch.float32
    expected = rms_norm(x @ linear.weight.T, norm.weight, EPS)
    assert torch.allclose(found.float(), expected, atol=0.05)
    found.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32

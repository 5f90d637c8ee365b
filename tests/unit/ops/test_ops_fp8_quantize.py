"""Rows, columns and weights in FP8, grouped by expert, against loops in float64 and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.ops.fp8 import (
    BLOCK,
    E4M3,
    FP8_QUANTIZE,
    ColumnBlocks,
    dequantize_1x128,
    dequantize_columns,
    dequantize_weight,
    padded_places,
    quantize_1x128,
    quantize_128x128,
    reference,
)
from deepseek_v3.ops.operation import Target
from helpers.fp8_groups import places_of_rows

SIZES = st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 260]), min_size=1, max_size=5)
FLOATS = [torch.bfloat16, torch.float32, torch.float64]


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def check_columns(columns: ColumnBlocks, x_XD: Tensor, sizes: list[int], power_of_two: bool) -> None:
    """Compares columns with the rows that they hold, block by block."""
    width, used = x_XD.shape[1], sum(math.ceil(size / BLOCK) * BLOCK for size in sizes)
    places = padded_places(sum(sizes), len(sizes))
    assert (columns.values_DP.dtype, columns.scales_BD.dtype) == (E4M3, torch.float32)
    assert (columns.values_DP.shape, columns.scales_BD.shape) == ((width, places), (places // BLOCK, width))
    assert columns.values_DP.is_contiguous()
    assert columns.scales_BD.is_contiguous()
    padded_PD = torch.zeros(used, width, dtype=x_XD.dtype)
    padded_PD[places_of_rows(sizes)] = x_XD
    values_DP, scales_DB = quantize_1x128(padded_PD.T, power_of_two)
    assert torch.equal(columns.values_DP[:, :used].view(torch.uint8), values_DP.view(torch.uint8))
    assert torch.equal(columns.scales_BD[: used // BLOCK], scales_DB.T)


@pytest.mark.parametrize("power", range(-40, 40, 7))
@pytest.mark.parametrize("share", [0.5, 0.50001, 0.7, 0.99999, 1.0])
def test_powers_of_two_are_the_next_above(power: int, share: float) -> None:
    x_TD = torch.full((1, BLOCK), share * 448.0 * 2.0**power)
    for quantize in (quantize_1x128, quantize_128x128):
        _, scales = quantize(x_TD, power_of_two=True)
        exact = float(x_TD[0, 0]) / 448.0
        assert scales.item() == 2.0 ** math.ceil(math.log2(exact))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38, math.inf, -math.inf, math.nan])
def test_powers_of_two_at_the_ends_of_float32(value: float) -> None:
    x_TD = torch.ones(1, 2 * BLOCK)
    x_TD[0, :BLOCK] = value
    values_TD, scales_TG = quantize_1x128(x_TD, power_of_two=True)
    found_TD = dequantize_1x128(values_TD, scales_TG, torch.float64)
    assert found_TD[0, BLOCK:].eq(1).all()
    if math.isfinite(value):
        assert torch.frexp(scales_TG)[0].eq(0.5).all()
        assert (found_TD[0, :BLOCK] - value).abs().le(abs(value) / 16 + 2.0**-136).all()
    else:
        assert found_TD[0, :BLOCK].isnan().all()


def test_dequantized_numbers_are_exact_in_float64() -> None:
    values_TD, scales_TG = quantize_1x128(torch.randn(4, 300))
    blocks_D = torch.arange(300) // BLOCK
    assert torch.equal(
        dequantize_1x128(values_TD, scales_TG, torch.float64), values_TD.double() * scales_TG.double()[:, blocks_D]
    )


@given(
    rows=st.sampled_from([0, 1, 127, 128, 129, 300]),
    width=st.sampled_from([1, 16, 128, 130, 256]),
    dtype=st.sampled_from(FLOATS),
    power_of_two=st.booleans(),
)
def test_rows_and_columns_of_one_group(rows: int, width: int, dtype: torch.dtype, power_of_two: bool) -> None:
    x_TD = torch.randn(rows, width, dtype=torch.float64).to(dtype)
    by_rows, by_columns = reference.quantize_both(x_TD, power_of_two)
    expected = quantize_1x128(x_TD, power_of_two)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(by_rows, expected, strict=True))
    check_columns(by_columns, x_TD, [rows], power_of_two)
    found_DP = dequantize_columns(by_columns, torch.float64)
    assert (found_DP[:, :rows].T - x_TD.double()).abs().le(x_TD.double().abs() / 16 + 1e-4).all()


@given(sizes=SIZES, width=st.sampled_from([1, 16, 130]), dtype=st.sampled_from(FLOATS), power_of_two=st.booleans())
def test_columns_of_gathered_rows(sizes: list[int], width: int, dtype: torch.dtype, power_of_two: bool) -> None:
    x_RD = torch.randn(40, width, dtype=torch.float64).to(dtype)
    source_X = torch.randint(0, len(x_RD), (sum(sizes),))
    columns = reference.gather_columns(x_RD, source_X, ends_of(sizes), power_of_two)
    check_columns(columns, x_RD[source_X], sizes, power_of_two)

    rows = reference.quantize_rows(x_RD, power_of_two)
    copies = reference.gather_rows(rows, source_X)
    rounded_XD = dequantize_1x128(*rows, dtype)[source_X]
    assert torch.equal(dequantize_1x128(*copies, dtype), rounded_XD)
    columns = reference.requantize_columns(rows, source_X, ends_of(sizes), power_of_two, dtype)
    check_columns(columns, rounded_XD, sizes, power_of_two)


@given(
    experts=st.integers(1, 3),
    out=st.sampled_from([1, 128, 144, 300]),
    width=st.sampled_from([1, 128, 144, 300]),
    power_of_two=st.booleans(),
)
def test_weights_and_their_transposes(experts: int, out: int, width: int, power_of_two: bool) -> None:
    w_EOI = torch.randn(experts, out, width)
    weight, transposed = reference.quantize_weight(w_EOI, power_of_two)
    for expert in range(experts):
        values_OI, scales = quantize_128x128(w_EOI[expert], power_of_two)
        assert torch.equal(weight.values_EOI[expert].float(), values_OI.float())
        assert torch.equal(weight.scales[expert], scales)
    exact_EOI = dequantize_weight(weight, torch.float64)
    assert torch.equal(dequantize_weight(transposed, torch.float64), exact_EOI.mT)
    assert (exact_EOI - w_EOI.double()).abs().le(w_EOI.double().abs() / 16 + 1e-4).all()
    assert all(part.is_contiguous() for part in (*weight, *transposed))


def swiglu_by_hand(gate_up_XG2: Tensor, gates_X: Tensor | None) -> Tensor:
    gate_XF, up_XF = gate_up_XG2.chunk(2, -1)
    hidden_XF = gate_XF / (1 + torch.exp(-gate_XF)) * up_XF
    return hidden_XF if gates_X is None else hidden_XF * gates_X[:, None]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [128, 80])
def test_hidden_layers_and_their_inputs_are_kept(width: int, gated: bool) -> None:
    gate_up_XG2 = torch.randn(7, 2 * width, dtype=torch.float64) * 3
    gates_X = torch.rand(7) if gated else None
    hidden, kept = reference.swiglu(gate_up_XG2, gates_X, False)
    expected = quantize_1x128(swiglu_by_hand(gate_up_XG2, gates_X))
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(hidden, expected, strict=True))
    assert torch.equal(kept.values_XD.float(), quantize_1x128(gate_up_XG2)[0].float())
    at_zero, _ = reference.swiglu(torch.tensor([[-1e4, 1e4, 3.0, 1.0]]), None, False)
    assert dequantize_1x128(*at_zero, torch.float32).tolist() == [[0.0, pytest.approx(1e4, rel=1e-3)]]


@pytest.mark.parametrize("sizes", [None, [3, 0, 129, 1]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [128, 80])
def test_gradients_are_those_of_autograd(width: int, gated: bool, sizes: list[int] | None) -> None:
    rows = 133
    kept = reference.quantize_rows(torch.randn(rows, 2 * width) * 3, False)
    gate_up_XG2 = dequantize_1x128(*kept, torch.float64).requires_grad_()
    gates_X = torch.rand(rows, dtype=torch.float64).requires_grad_() if gated else None
    grad_XF = torch.randn(rows, width, dtype=torch.float64)
    hidden_XF = swiglu_by_hand(gate_up_XG2, gates_X)
    wanted = torch.autograd.grad(hidden_XF, [gate_up_XG2, *([gates_X] if gated else [])], grad_XF)

    ends_E = None if sizes is None else ends_of(sizes)
    no_grad = None if gates_X is None else gates_X.detach()
    grad_rows, grad_columns, hidden_columns, grad_gates_X = reference.swiglu_backward(
        kept, grad_XF, no_grad, ends_E, False
    )

    for columns, exact_XD in ((grad_columns, wanted[0]), (hidden_columns, hidden_XF.detach())):
        padded = padded_places(rows, len(sizes or [rows]))
        places = places_of_rows(sizes or [rows])
        exact_DP = torch.zeros(exact_XD.shape[1], padded, dtype=torch.float64)
        exact_DP[:, places] = exact_XD.T
        found_DP = dequantize_columns(columns, torch.float64)
        assert found_DP.shape == exact_DP.shape
        assert (found_DP - exact_DP).abs().le(exact_DP.abs() / 15 + 1e-2 * exact_DP.abs().max()).all()
    exact_XG2 = wanted[0]
    found_XG2 = dequantize_1x128(*grad_rows, torch.float64)
    bound_XG2 = exact_XG2.abs() / 15.9 + grad_rows.scales_XG.amax(1, keepdim=True) * 2.0**-10
    assert (found_XG2 - exact_XG2).abs().le(bound_XG2).all()
    if gated:
        torch.testing.assert_close(grad_gates_X, wanted[1].float(), rtol=1e-6, atol=1e-6)
    else:
        assert grad_gates_X is None


def test_the_reference_runs_everywhere() -> None:
    assert FP8_QUANTIZE.select(Target(torch.device("cpu"))).run is reference

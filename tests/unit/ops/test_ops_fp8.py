"""Numbers of 8 bits with a scale for each 1×128 or 128×128 block, against float64 and the bounds of the format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128

LARGEST = 448.0
# e4m3 has three bits after the leading one, down to 2⁻⁶, and steps of 2⁻⁹ below.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


def scales_by_hand(x_TD: Tensor) -> list[list[float]]:
    """For each block of each row its largest number over 448, in float64."""
    rows = x_TD.double().abs().tolist()
    return [[max(row[i : i + BLOCK]) / LARGEST for i in range(0, len(row), BLOCK)] for row in rows]


def of_blocks(values_TG: Tensor, width: int) -> Tensor:
    """A value for each number of a row, from one for each block."""
    return values_TG.repeat_interleave(BLOCK, dim=1)[:, :width]


@given(
    rows=st.integers(0, 3),
    width=st.sampled_from([1, 5, 127, 128, 129, 256, 300]),
    exponent=st.integers(-30, 30),
    spread=st.integers(0, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_numbers_come_back_within_the_bounds_of_the_format(
    rows: int, width: int, exponent: int, spread: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = exponent - spread * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    x_TD = (torch.randn(rows, width, generator=generator, dtype=torch.float64) * 2**magnitudes).to(dtype)

    quantized_TD, scales_TG = quantize_1x128(x_TD)
    found_TD = dequantize_1x128(quantized_TD, scales_TG, torch.float64)

    assert (quantized_TD.dtype, quantized_TD.shape) == (torch.float8_e4m3fn, x_TD.shape)
    assert quantized_TD.is_contiguous()
    assert (scales_TG.dtype, scales_TG.shape) == (torch.float32, (rows, -(-width // BLOCK)))
    expected_TG = torch.tensor(scales_by_hand(x_TD), dtype=torch.float64).view(scales_TG.shape)
    assert torch.allclose(scales_TG.double(), expected_TG, rtol=1e-6, atol=0)
    exact_TD, scale_TD = x_TD.double(), of_blocks(scales_TG.double(), width)
    bound_TD = torch.maximum(RELATIVE * exact_TD.abs(), ABSOLUTE * scale_TD)
    assert (found_TD - exact_TD).abs().le(bound_TD * (1 + 1e-6)).all()


def test_every_number_of_the_format_comes_back_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()]
    x_TD = torch.stack([numbers.roll(shift) for shift in range(0, 254, 64)])[:, :128]
    x_TD[:, 0] = LARGEST
    quantized_TD, scales_TG = quantize_1x128(x_TD)
    assert scales_TG.eq(1).all()
    assert torch.equal(dequantize_1x128(quantized_TD, scales_TG, torch.float32), x_TD)


def test_a_block_does_not_touch_the_next() -> None:
    x_TD = torch.ones(1, 3 * BLOCK)
    x_TD[0, BLOCK] = 1e6
    quantized_TD, scales_TG = quantize_1x128(x_TD)
    found_TD = dequantize_1x128(quantized_TD, scales_TG, torch.float32)
    assert torch.equal(found_TD[0, :BLOCK], x_TD[0, :BLOCK])
    assert torch.equal(found_TD[0, 2 * BLOCK :], x_TD[0, 2 * BLOCK :])
    assert found_TD[0, BLOCK] == pytest.approx(1e6)
    assert found_TD[0, BLOCK + 1] == 0


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_blocks_at_the_ends_of_float32(value: float) -> None:
    """No scale is zero or too small to divide by; what underflows becomes zero."""
    x_TD = torch.full((1, BLOCK), value)
    quantized_TD, scales_TG = quantize_1x128(x_TD)
    found_TD = dequantize_1x128(quantized_TD, scales_TG, torch.float32)
    assert scales_TG.ge(torch.finfo(torch.float32).tiny).all()
    assert (found_TD - x_TD).abs().le(RELATIVE * x_TD + ABSOLUTE * scales_TG).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_non_finite_number_makes_its_block_nan(value: float) -> None:
    x_TD = torch.ones(1, 2 * BLOCK)
    x_TD[0, 3] = value
    found_TD = dequantize_1x128(*quantize_1x128(x_TD), torch.float32)
    assert found_TD[0, :BLOCK].isnan().all()
    assert found_TD[0, BLOCK:].eq(1).all()


def square_blocks(values_BG: Tensor, shape: torch.Size) -> Tensor:
    """A value for each number of a weight, from one for each 128×128 block."""
    rows, columns = torch.arange(shape[0]) // BLOCK, torch.arange(shape[1]) // BLOCK
    return values_BG[rows][:, columns]


SIZES = [0, 1, 127, 128, 129, 300]


@given(
    rows=st.sampled_from(SIZES),
    width=st.sampled_from(SIZES),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_weights_come_back_within_the_bounds_of_the_format(
    rows: int, width: int, exponent: int, dtype: torch.dtype, part: tuple[float, float]
) -> None:
    limit = 8 if dtype == torch.float16 else exponent  # float16 ends at 2¹⁶
    w_VD = (torch.randn(rows, width, dtype=torch.float64) * 2.0 ** min(exponent, limit)).to(dtype)

    quantized_VD, scales_BG = quantize_128x128(w_VD)

    assert (quantized_VD.dtype, quantized_VD.shape) == (torch.float8_e4m3fn, w_VD.shape)
    assert quantized_VD.is_contiguous()
    assert (scales_BG.dtype, scales_BG.shape) == (torch.float32, (-(-rows // BLOCK), -(-width // BLOCK)))
    scales_VD = square_blocks(scales_BG.double(), w_VD.shape)
    found_VD = dequantize_128x128(quantized_VD, scales_BG, torch.float64)
    assert torch.equal(found_VD, quantized_VD.double() * scales_VD)
    bound_VD = torch.maximum(RELATIVE * w_VD.double().abs(), ABSOLUTE * scales_VD)
    assert (found_VD - w_VD.double()).abs().le(bound_VD * (1 + 1e-6)).all()
    first, last = sorted(int(share * rows) for share in part)
    some_VD = dequantize_128x128(quantized_VD[first:last], scales_BG, torch.float64, first)
    assert torch.equal(some_VD, found_VD[first:last])


def test_a_square_block_touches_no_other() -> None:
    w_VD = torch.ones(3 * BLOCK, 3 * BLOCK)
    w_VD[BLOCK + 5, BLOCK + 7] = 1e6
    quantized_VD, scales_BG = quantize_128x128(w_VD)
    expected_BG = torch.full((3, 3), 1 / LARGEST)
    expected_BG[1, 1] = 1e6 / LARGEST
    assert torch.allclose(scales_BG, expected_BG, rtol=1e-6, atol=0)
    found_VD = dequantize_128x128(quantized_VD, scales_BG, torch.float32)
    assert found_VD[BLOCK : 2 * BLOCK, BLOCK : 2 * BLOCK].count_nonzero() == 1
    assert found_VD.eq(1).sum() == 8 * BLOCK**2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_makes_its_square_nan(value: float) -> None:
    w_VD = torch.ones(BLOCK + 1, BLOCK + 1)
    w_VD[0, BLOCK] = value
    found_VD = dequantize_128x128(*quantize_128x128(w_VD), torch.float32)
    assert found_VD[:BLOCK, BLOCK].isnan().all()
    assert found_VD[:, :BLOCK].eq(1).all()
    assert found_VD[BLOCK, BLOCK] == 1

"""The FP8 kernels against the reference, bit by bit; SwiGLU, whose exponential differs, by the format's bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import (
    BLOCK,
    E4M3,
    FP8_QUANTIZE,
    ColumnBlocks,
    Fp8Quantize,
    dequantize_1x128,
    dequantize_columns,
    padded_places,
    reference,
)
from deepseek_v3.ops.operation import Target
from helpers.experts import fill_new_memory_with_nan
from helpers.fp8_groups import places_of_rows

SIZES = [3, 0, 129, 128, 0]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, triton_device: torch.device) -> Iterator[Fp8Quantize]:
    """The kernels of each back end, on tensors of `triton_device`; what they leave unwritten is NaN."""
    backend = FP8_QUANTIZE.backends[request.param]
    obstacle = backend.obstacle(Target(triton_device)) if triton_device.type == "cuda" else None
    if obstacle:
        pytest.skip(f"{request.param} {obstacle}")
    with fill_new_memory_with_nan(), np.errstate(all="ignore"):  # the interpreter computes with NumPy
        yield backend.load()


def numbers(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, with zeros of both signs and numbers that are too small for e4m3."""
    x_XD = torch.randn(rows, width) * torch.exp(3 * torch.randn(rows, 1)) * torch.exp(2 * torch.randn(rows, width))
    x_XD[torch.rand(rows, width) < 0.1] = 0.0
    x_XD[torch.rand(rows, width) < 0.1] *= -1e-12
    return x_XD.to(dtype)


def extremes(dtype: torch.dtype) -> Tensor:
    """Tiles with infinity, NaN, numbers near both ends of float32, and zeros only."""
    x_XD = numbers(BLOCK, 6 * BLOCK, dtype)
    for row, value in enumerate([math.inf, math.nan, -math.inf]):
        x_XD[row, row * BLOCK + 5] = value
    for tile, factor in ((3, 1e-39), (4, 1e34), (5, -0.0)):
        x_XD[:, tile * BLOCK : (tile + 1) * BLOCK] *= factor
    return x_XD


def on(device: torch.device, value: Any) -> Any:
    """A tensor, or the tensors of a tuple, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(on(device, part) for part in value)) if hasattr(value, "_fields") else value


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """NaN equals NaN, whatever its bits are; zeros have signs."""
    found, expected, size = found.cpu(), expected.cpu(), expected.element_size()
    if (found.dtype, found.shape) != (expected.dtype, expected.shape) or not found.is_contiguous():
        return False
    integer = {1: torch.uint8, 4: torch.int32}[size]
    both_nan = found.float().isnan() & expected.float().isnan()
    return bool(((found.view(integer) == expected.view(integer)) | both_nan).all())


def check(found: Any, expected: Any, places: int | None = None) -> None:
    """Compares formats bit by bit; of columns the first `places`, behind which they are undefined."""
    if isinstance(expected, ColumnBlocks):
        used = expected.values_DP.shape[1] if places is None else places
        assert found.values_DP.shape == expected.values_DP.shape
        assert found.scales_BD.shape == expected.scales_BD.shape
        assert same_bits(found.values_DP[:, :used].contiguous(), expected.values_DP[:, :used].contiguous())
        assert same_bits(found.scales_BD[: used // BLOCK], expected.scales_BD[: used // BLOCK].contiguous())
    elif isinstance(expected, Tensor):
        assert same_bits(found, expected)
    else:
        for one, other in zip(found, expected, strict=True):
            check(one, other, places)


def ends_of(sizes: list[int]) -> tuple[Tensor, int]:
    """The ends of groups, and the places that they use."""
    return torch.tensor(sizes).cumsum(0).int(), sum(math.ceil(size / BLOCK) * BLOCK for size in sizes)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 300), (130, 80), "extremes", pytest.param((700, 1168), marks=pytest.mark.gpu)]
)
def test_rows_and_columns(
    kernels: Fp8Quantize, triton_device: torch.device, shape: Any, dtype: torch.dtype, power_of_two: bool
) -> None:
    x_TD = extremes(dtype) if shape == "extremes" else numbers(*shape, dtype)
    rows, columns = reference.quantize_both(x_TD, power_of_two)
    on_device = x_TD.to(triton_device)
    check(kernels.quantize_both(on_device, power_of_two), (rows, columns))
    check(kernels.quantize_rows(on_device, power_of_two), rows)
    check(kernels.quantize_columns(on_device, power_of_two), columns)


def test_every_quotient_is_rounded_as_a_division_does(kernels: Fp8Quantize, triton_device: torch.device) -> None:
    """All fractions of a bfloat16 over all of its block's largest number; float32 around the ties of e4m3."""
    fractions, factors = torch.arange(128, 256).float(), 2.0 ** torch.arange(-19.0, 0.0)
    smaller = (fractions * factors[:, None]).flatten()
    blocks = smaller.view(-1, BLOCK).repeat(128, 1)
    blocks[:, 0] = fractions.repeat_interleave(len(factors))
    assert torch.equal(blocks.bfloat16().float(), blocks)

    largest = torch.rand(300, 1) + 0.5
    scales = largest / 448
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = (scales * ties).view(torch.int32) + torch.randint(-2, 3, (300, len(ties)))
    around = torch.cat([largest, near.view(torch.float32), -largest], dim=1)

    for x_TD in (blocks.bfloat16(), around, around * 2.0**-100):
        check(kernels.quantize_rows(x_TD.to(triton_device), False), reference.quantize_rows(x_TD, False))


@pytest.mark.parametrize(("width", "power_of_two"), [(80, True), (144, False)])
@pytest.mark.parametrize("sizes", [SIZES, [200], [0, 0]])
@pytest.mark.parametrize("apart", [3, 8])  # with 8, pieces of 16 bytes are aligned
def test_gathered_rows_and_columns(
    kernels: Fp8Quantize,
    triton_device: torch.device,
    sizes: list[int],
    width: int,
    power_of_two: bool,
    apart: int,
) -> None:
    """Rows that lie apart in memory full of NaN."""
    ends_E, used = ends_of(sizes)
    memory = torch.full((40, width + apart), torch.nan, dtype=torch.bfloat16)
    x_RD = memory[:, :width]
    x_RD.copy_(numbers(40, width))
    source_X = torch.randint(0, 40, (sum(sizes),))
    on_device = memory.to(triton_device)[:, :width], source_X.to(triton_device), ends_E.to(triton_device)
    expected = reference.gather_columns(x_RD, source_X, ends_E, power_of_two)
    check(kernels.gather_columns(*on_device, power_of_two), expected, used)

    rows = reference.quantize_rows(x_RD, power_of_two)
    rows_on_device = on(triton_device, rows)
    check(kernels.gather_rows(rows_on_device, on_device[1]), reference.gather_rows(rows, source_X))
    for dtype in DTYPES:
        expected = reference.requantize_columns(rows, source_X, ends_E, power_of_two, dtype)
        found = kernels.requantize_columns(rows_on_device, *on_device[1:], power_of_two, dtype)
        check(found, expected, used)


def test_wide_rows_are_copied_in_parts(kernels: Fp8Quantize, triton_device: torch.device) -> None:
    rows = reference.quantize_rows(numbers(3, 4096 + 300), False)
    source_X = torch.tensor([2, 0, 0, 1, 2])
    found = kernels.gather_rows(on(triton_device, rows), source_X.to(triton_device))
    check(found, reference.gather_rows(rows, source_X))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 130, 80), "extremes"])
def test_weights(
    kernels: Fp8Quantize, triton_device: torch.device, shape: Any, dtype: torch.dtype, power_of_two: bool
) -> None:
    """Weights whose rows and experts lie apart, too."""
    w_EOI = extremes(dtype)[None] if shape == "extremes" else torch.randn(shape).to(dtype)
    expected = reference.quantize_weight(w_EOI, power_of_two)
    padded = torch.full([size + 2 for size in w_EOI.shape], torch.nan, dtype=dtype, device=triton_device)
    apart = padded[: w_EOI.shape[0], : w_EOI.shape[1], : w_EOI.shape[2]]
    for given in (w_EOI.to(triton_device), apart.copy_(w_EOI), w_EOI.mT.contiguous().mT.to(triton_device)):
        check(kernels.quantize_weight(given, power_of_two), expected)


def check_quantized(found: Tensor, exact: Tensor, scales: Tensor) -> None:
    """The bounds of the format, a little wider for the rounding before."""
    assert (found - exact).abs().le(exact.abs() * (1.001 / 16) + scales * (1.001 * 2.0**-10)).all()


def check_scales(found: Tensor, exact: Tensor) -> None:
    """Where the slope of silu is near zero, at -1.28, float32 computes it as a difference of larger numbers."""
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7 * float(exact.max()))


def of_rows(scales_XG: Tensor, width: int) -> Tensor:
    return scales_XG.double().repeat_interleave(BLOCK, 1)[:, :width]


@pytest.mark.parametrize(("gated", "power_of_two"), [(False, True), (True, False)])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (70, 256), (40, 80)])
def test_swiglu(
    kernels: Fp8Quantize, triton_device: torch.device, rows: int, width: int, gated: bool, power_of_two: bool
) -> None:
    memory = (3 * torch.randn(rows, 2 * width + 8)).bfloat16()
    gate_up_XG2 = memory[:, : 2 * width]
    gate_up_XG2[0, :3] = torch.tensor([-1e4, 1e4, 0.0])
    gates_X = torch.rand(rows) if gated else None
    hidden, kept = kernels.swiglu(
        memory.to(triton_device)[:, : 2 * width], on(triton_device, gates_X), power_of_two
    )
    check(kept, reference.quantize_rows(gate_up_XG2, power_of_two))
    exact_XF = reference.swiglu_hidden(gate_up_XG2.double(), gates_X)
    _, scales_XG = reference.quantize_rows(exact_XF, power_of_two)
    hidden = on(torch.device("cpu"), hidden)
    check_scales(hidden.scales_XG, scales_XG)
    check_quantized(dequantize_1x128(*hidden, torch.float64), exact_XF, of_rows(scales_XG, width))


@pytest.mark.parametrize(("gated", "power_of_two"), [(False, True), (True, False)])
@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("width", [256, 80, pytest.param(640, marks=pytest.mark.gpu)])
def test_swiglu_backward(
    kernels: Fp8Quantize,
    triton_device: torch.device,
    width: int,
    sizes: list[int] | None,
    gated: bool,
    power_of_two: bool,
) -> None:
    rows = sum(sizes or [150])
    ends_E, used = (None, 256) if sizes is None else ends_of(sizes)
    kept = reference.quantize_rows(3 * torch.randn(rows, 2 * width), power_of_two)
    memory = torch.randn(rows, width + 8).bfloat16()
    gates_X = torch.rand(rows) if gated else None
    arguments = on(triton_device, kept), memory.to(triton_device)[:, :width], on(triton_device, gates_X)
    found = kernels.swiglu_backward(*arguments, on(triton_device, ends_E), power_of_two)
    grad_rows, grad_columns, hidden_columns, grad_gates_X = (on(torch.device("cpu"), each) for each in found)

    exact = reference.swiglu_gradients(kept, memory[:, :width].double(), gates_X)
    _, scales_XG = reference.quantize_rows(exact[0], power_of_two)
    check_scales(grad_rows.scales_XG, scales_XG)
    check_quantized(dequantize_1x128(*grad_rows, torch.float64), exact[0], of_rows(scales_XG, 2 * width))
    groups_E = torch.tensor([rows], dtype=torch.int32) if ends_E is None else ends_E
    for columns, exact_XD in ((grad_columns, exact[0]), (hidden_columns, exact[1])):
        expected = reference.gather_columns(exact_XD, torch.arange(rows), groups_E, power_of_two)
        assert columns.values_DP.shape == expected.values_DP.shape
        assert columns.values_DP.shape[1] == padded_places(rows, len(groups_E))
        scales_BD = expected.scales_BD[: used // BLOCK]
        check_scales(columns.scales_BD[: used // BLOCK], scales_BD)
        exact_DP = torch.zeros(exact_XD.shape[1], used, dtype=torch.float64)
        exact_DP[:, places_of_rows(sizes or [rows])] = exact_XD.T
        found_DP = dequantize_columns(columns, torch.float64)[:, :used]
        check_quantized(found_DP, exact_DP, of_rows(scales_BD.T, used))
    if gated:
        torch.testing.assert_close(grad_gates_X.double(), exact[2].double(), rtol=1e-4, atol=1e-4)
    else:
        assert grad_gates_X is None


def test_nothing_is_quantized(kernels: Fp8Quantize, triton_device: torch.device) -> None:
    x_TD, none = torch.zeros(0, 256, device=triton_device), torch.zeros(0, dtype=torch.int64, device=triton_device)
    ends_E = torch.zeros(3, dtype=torch.int32, device=triton_device)
    rows, columns = kernels.quantize_both(x_TD, False)
    assert (rows.values_XD.shape, columns.values_DP.shape) == ((0, 256), (256, 0))
    assert kernels.gather_rows(rows, none).scales_XG.shape == (0, 2)
    assert kernels.gather_columns(x_TD, none, ends_E, False).values_DP.shape == (256, 2 * BLOCK)
    hidden, kept = kernels.swiglu(x_TD, None, False)
    grad_rows, *_, grad_gates_X = kernels.swiglu_backward(kept, x_TD[:, :128], x_TD[:, 0], ends_E, False)
    assert (hidden.values_XD.shape, grad_rows.values_XD.shape, grad_gates_X.shape) == ((0, 128), (0, 256), (0,))


def test_compiled_graphs_hold_the_operations_whole(kernels: Fp8Quantize, triton_device: torch.device) -> None:
    """Without a break, and with sizes that are no constants."""

    def quantize(x_XD: Tensor, gates_X: Tensor, source_X: Tensor, ends_E: Tensor) -> Any:
        rows, columns = kernels.quantize_both(x_XD, False)
        hidden, kept = kernels.swiglu(x_XD, gates_X, False)
        backward = kernels.swiglu_backward(kept, x_XD[:, :128], gates_X, ends_E, False)
        copies = kernels.gather_rows(rows, source_X)
        gathered = kernels.gather_columns(x_XD, source_X, ends_E, False)
        again = kernels.requantize_columns(rows, source_X, ends_E, False, torch.bfloat16)
        weights = kernels.quantize_weight(x_XD[None], True)
        alone = kernels.quantize_rows(x_XD, True), kernels.quantize_columns(x_XD, True)
        return rows, columns, hidden, kept, backward, copies, gathered, again, weights, alone

    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True, dynamic=True)
    ends_E = torch.tensor([3, 3, 140], dtype=torch.int32, device=triton_device)
    gates_X, source_X = torch.rand(140, device=triton_device), torch.arange(140, device=triton_device)
    given = numbers(140, 256, torch.bfloat16).to(triton_device), gates_X, source_X, ends_E
    check(compiled(*given), quantize(*given), 3 * BLOCK)


def test_auto_takes_the_kernels_where_they_run() -> None:
    selection = FP8_QUANTIZE.select(Target(torch.device("cpu")))
    assert (selection.backend, selection.run) == ("reference", reference)
    assert str(selection) == "fp8_quantize reference (cuda needs a CUDA device; triton needs a CUDA device)"


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("triton", (8, 0), "needs a GPU that converts to e4m3 (compute capability 8.9)"),
        ("cuda", (8, 9), "needs a GPU of compute capability 9.0"),
        ("cuda", (10, 0), "needs a GPU of compute capability 9.0"),
    ],
)
def test_other_gpus_are_refused(
    name: str, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("deepseek_v3.ops.fp8.triton_obstacle", lambda _: None)
    assert FP8_QUANTIZE.backends[name].obstacle(Target(torch.device("cuda"))) == expected


@pytest.mark.gpu
def test_more_numbers_than_an_int32_counts() -> None:
    """The last blocks, which lie behind 2³¹ numbers, of the input and of every result."""
    kernels, device = FP8_QUANTIZE.select(Target(torch.device("cuda"))).run, torch.device("cuda")
    rows, width = 300 * 1024, 7168
    x_TD = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    x_TD[-2 * BLOCK :] = numbers(2 * BLOCK, width).to(device)
    last = x_TD[-BLOCK:].cpu()
    by_rows, by_columns = kernels.quantize_both(x_TD, False)
    expected_rows, expected_columns = reference.quantize_both(last, False)
    check([part[-BLOCK:] for part in by_rows], expected_rows)
    check([part[-BLOCK:] for part in kernels.quantize_rows(x_TD, False)], expected_rows)
    del by_rows
    check([by_columns[0][:, -BLOCK:].contiguous(), by_columns[1][-1:]], tuple(expected_columns))
    del by_columns
    source_X = torch.arange(rows, device=device)
    ends_E = torch.tensor([rows], dtype=torch.int32, device=device)
    columns = kernels.gather_columns(x_TD, source_X, ends_E, False)
    check([columns[0][:, -BLOCK:].contiguous(), columns[1][-1:]], tuple(expected_columns))
    del columns
    _, kept = kernels.swiglu(x_TD, None, False)
    check([part[-BLOCK:] for part in kept], expected_rows)
    grad_XF = torch.ones(rows, width // 2, dtype=torch.bfloat16, device=device)
    grad_rows, grad_columns, _, _ = kernels.swiglu_backward(kept, grad_XF, None, None, False)
    few_rows, few_columns, _, _ = kernels.swiglu_backward(
        type(kept)(*(part[-BLOCK:].contiguous() for part in kept)), grad_XF[-BLOCK:], None, None, False
    )
    check([part[-BLOCK:] for part in grad_rows], tuple(part.cpu() for part in few_rows))
    check([grad_columns[0][:, -BLOCK:].contiguous()], [few_columns[0].cpu()])

"""Products of matrices in 8-bit blocks, against float64 on the dequantized operands."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, E4M3, ColumnBlocks, RowBlocks, WeightBlocks, group_starts, padded_places
from deepseek_v3.ops.fp8_gemm import FP8_GEMM, Fp8Gemm
from deepseek_v3.ops.operation import Target

GROUPS = {
    "uneven": [3, 130, 1, 257],
    "empty first, middle and last": [0, 5, 0, 129, 0],
    "all rows in one": [0, 0, 128, 0],
    "all rows in the last": [0, 0, 0, 300],
    "one group": [200],
    "no rows": [0, 0, 0],
    "a dense layer": None,
    "a dense layer without rows": None,
}
DENSE_ROWS = {"a dense layer": 150, "a dense layer without rows": 0}
WIDTHS = [(16, 16), (128, 256), (144, 80), (48, 400)]  # output, input


class Gemm(NamedTuple):
    """A back end, where it runs, and its error as a share of the sum of the products' absolute values."""

    run: Fp8Gemm
    device: torch.device
    tolerance: float


@pytest.fixture(
    params=[
        pytest.param("reference on a CPU"),
        *(pytest.param(f"{name} on a GPU", marks=pytest.mark.gpu) for name in FP8_GEMM.backends),
    ]
)
def gemm(request: pytest.FixtureRequest) -> Gemm:
    """Each back end, and each place where it can be tested."""
    name, _, place = request.param.partition(" on a ")
    backend, device = FP8_GEMM.backends[name], torch.device("cuda" if place == "GPU" else "cpu")
    obstacle = backend.obstacle(Target(device, torch.bfloat16, (16,))) if place == "GPU" else None
    if obstacle:
        pytest.skip(f"{name} {obstacle}")
    # The tensor cores of Hopper keep about 13 bits of a sum within a block.
    return Gemm(backend.load(), device, 2e-6 if name == "reference" else 2.0**-11)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(E4M3)


def scales(*shape: int) -> Tensor:
    """Scales so different that a wrong one shows."""
    return 2 ** (6 * torch.rand(shape) - 3)


def of_blocks(scales: Tensor, axis: int, size: int) -> Tensor:
    return scales.double().repeat_interleave(BLOCK, axis).narrow(axis, 0, size)


def case(groups: str) -> tuple[list[int], Tensor | None]:
    """The sizes of the groups, and their ends as a back end takes them."""
    sizes = GROUPS[groups]
    if sizes is None:
        return [DENSE_ROWS[groups]], None
    return sizes, torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def random_rows(number: int, width: int) -> tuple[RowBlocks, Tensor]:
    """Rows, and what they stand for in float64."""
    rows = RowBlocks(numbers(number, width), scales(number, -(-width // BLOCK)))
    return rows, rows.values_XD.double() * of_blocks(rows.scales_XG, 1, width)


def random_weights(number: int, output: int, width: int) -> tuple[WeightBlocks, Tensor]:
    blocks = scales(number, -(-output // BLOCK), -(-width // BLOCK))
    weights = WeightBlocks(numbers(number, output, width), blocks)
    return weights, weights.values_EOI.double() * of_blocks(of_blocks(blocks, 1, output), 2, width)


def random_columns(width: int, sizes: list[int]) -> tuple[ColumnBlocks, list[Tensor]]:
    """Columns with NaN behind the last group, and what each group stands for in float64."""
    places = padded_places(sum(sizes), len(sizes))
    columns = ColumnBlocks(
        torch.full((width, places), torch.nan).to(E4M3), torch.full((places // BLOCK, width), torch.nan)
    )
    exact, start = [], 0
    for size in sizes:
        end = start + -(-size // BLOCK) * BLOCK
        columns.values_DP[:, start:end] = numbers(width, end - start)
        columns.values_DP[:, start + size : end] = 0
        columns.scales_BD[start // BLOCK : end // BLOCK] = scales((end - start) // BLOCK, width)
        of_places = of_blocks(columns.scales_BD[start // BLOCK : end // BLOCK], 0, end - start).T
        exact.append(columns.values_DP[:, start:end].double() * of_places)
        start = end
    return columns, exact


def check(found: Tensor, exact: Tensor, largest: Tensor, tolerance: float) -> None:
    """`largest`: the sums of the absolute values of what is summed."""
    assert found.shape == exact.shape
    rounding = torch.finfo(found.dtype).eps / 2
    assert ((found.cpu().double() - exact).abs() <= tolerance * largest + rounding * exact.abs()).all()


def to(blocks, device: torch.device):
    return type(blocks)(*(tensor.to(device) for tensor in blocks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", GROUPS)
def test_rows_are_multiplied_by_their_groups_weight(gemm: Gemm, groups: str, dtype: torch.dtype) -> None:
    sizes, ends_E = case(groups)
    for output, width in WIDTHS:
        a, rows_XI = random_rows(sum(sizes), width)
        w, weight_EOI = random_weights(len(sizes), output, width)
        ends = None if ends_E is None else ends_E.to(gemm.device)

        found_XO = gemm.run.rows_product(to(a, gemm.device), to(w, gemm.device), ends, dtype)

        assert found_XO.dtype == dtype
        pairs = list(zip(rows_XI.split(sizes), weight_EOI, strict=True))
        exact_XO = torch.cat([rows @ weight.T for rows, weight in pairs])
        check(found_XO, exact_XO, torch.cat([x.abs() @ weight.abs().T for x, weight in pairs]), gemm.tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", GROUPS)
def test_gradients_of_weights_sum_over_their_groups_rows(gemm: Gemm, groups: str, dtype: torch.dtype) -> None:
    sizes, ends_E = case(groups)
    for output, width in WIDTHS:
        a, gradients = random_columns(output, sizes)
        b, inputs = random_columns(width, sizes)
        ends = None if ends_E is None else ends_E.to(gemm.device)

        found_EOI = gemm.run.columns_product(to(a, gemm.device), to(b, gemm.device), ends, sum(sizes), dtype)

        assert found_EOI.dtype == dtype
        pairs = list(zip(gradients, inputs, strict=True))
        exact_EOI = torch.stack([gradient @ x.T for gradient, x in pairs])
        largest_EOI = torch.stack([gradient.abs() @ x.abs().T for gradient, x in pairs])
        check(found_EOI, exact_EOI, largest_EOI, gemm.tolerance)


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_groups_begin_at_multiples_of_a_block(sizes: list[int]) -> None:
    """And the places suffice, without knowing the sizes."""
    lengths = [-(-size // BLOCK) * BLOCK for size in sizes]
    found_E = group_starts(torch.tensor(sizes).cumsum(0, dtype=torch.int32))
    assert found_E.dtype == torch.int32
    assert found_E.tolist() == [sum(lengths[:group]) for group in range(len(sizes))]
    places = padded_places(sum(sizes), len(sizes))
    assert places >= sum(lengths)
    assert len(sizes) > 1 or places == lengths[0]

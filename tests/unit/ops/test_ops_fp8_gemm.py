"""Products of matrices in 8-bit blocks, against float64 on the dequantized operands."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, E4M3, ColumnBlocks, RowBlocks, WeightBlocks, group_starts, padded_places
from deepseek_v3.ops.fp8_gemm import FP8_GEMM, Fp8Gemm, reference
from deepseek_v3.ops.operation import Target
from helpers.experts import fill_new_memory_with_nan
from helpers.triton_interpreter import round_as_a_gpu

# Rows of each group, output width, input width.
CASES = {
    "uneven": ([3, 66, 1, 131], 144, 80),
    "empty first, middle and last": ([0, 5, 0, 129, 0], 48, 272),
    "all rows in one": ([0, 0, 128, 0], 16, 16),
    "all rows in the last": ([0, 0, 0, 130], 128, 144),
    "one group": ([70], 272, 128),
    "a long sum": ([30, 100], 16, 1552),
    "no rows": ([0, 0, 0], 32, 16),
    "a dense layer": ([150], 144, 400),
    "a dense layer without rows": ([0], 16, 32),
}
Blocks = TypeVar("Blocks", RowBlocks, ColumnBlocks, WeightBlocks)


class Gemm(NamedTuple):
    """A back end, where it runs, and its error as a share of the sum of the products' absolute values."""

    run: Fp8Gemm
    device: torch.device
    tolerance: float

    def check(self, found: Tensor, exact: Tensor, largest: Tensor) -> None:
        """Compares with sums in float64; `largest` are the sums of the absolute values of what they add."""
        assert found.shape == exact.shape
        rounding = torch.finfo(found.dtype).eps / 2 * exact.abs()
        assert ((found.cpu().double() - exact).abs() <= self.tolerance * largest + rounding).all()


@pytest.fixture(
    params=[
        "reference on a CPU",
        "triton on a CPU",
        *(pytest.param(f"{name} on a GPU", marks=pytest.mark.gpu) for name in FP8_GEMM.backends),
    ]
)
def gemm(request: pytest.FixtureRequest) -> Iterator[Gemm]:
    """Each back end, and each place where it can be tested; Triton's interpreter runs its kernels on a CPU.

    New memory is full of NaN, so that a number that is never written shows.
    """
    name, _, place = request.param.partition(" on a ")
    backend, device = FP8_GEMM.backends[name], torch.device("cuda" if place == "GPU" else "cpu")
    obstacle = backend.obstacle(Target(device, torch.bfloat16, (16,))) if place == "GPU" else None
    if obstacle:
        pytest.skip(f"{name} {obstacle}")
    interpreted = (name, place) == ("triton", "CPU")
    if interpreted:
        pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
        if torch.cuda.is_available():
            pytest.skip("the same process cannot both interpret and compile")
    # Within a block, the tensor cores of Hopper keep about 13 bits of a sum.
    tolerance = 2.0**-11 if place == "GPU" and name != "reference" else 2e-6
    with fill_new_memory_with_nan(), round_as_a_gpu() if interpreted else nullcontext():
        yield Gemm(backend.load(), device, tolerance)


@pytest.fixture
def kernels(gemm: Gemm) -> Gemm:
    """Each back end but the reference."""
    if gemm.run is reference:
        pytest.skip("the reference is what kernels are compared with")
    return gemm


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(E4M3)


def scales(*shape: int) -> Tensor:
    """Scales so different that a wrong one shows."""
    return 2 ** (6 * torch.rand(shape) - 3)


def of_blocks(scales: Tensor, axis: int, size: int) -> Tensor:
    return scales.double().repeat_interleave(BLOCK, axis).narrow(axis, 0, size)


def ends_of(case: str, device: torch.device) -> Tensor | None:
    """The ends of a case's groups, as a back end takes them."""
    return None if "dense" in case else torch.tensor(CASES[case][0], device=device).cumsum(0).int()


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


def sums(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A product's sums and the sums of the absolute values of what they add, on the CPU."""
    return (rows @ weight.T).cpu(), (rows.abs() @ weight.abs().T).cpu()


def to(device: torch.device, blocks: Blocks) -> Blocks:
    return type(blocks)(*(tensor.to(device) for tensor in blocks))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_multiplied_by_their_groups_weight(gemm: Gemm, case: str) -> None:
    sizes, output, width = CASES[case]
    a, rows_XI = random_rows(sum(sizes), width)
    w, weight_EOI = random_weights(len(sizes), output, width)
    ends_E = ends_of(case, gemm.device)

    found_XO = gemm.run.rows_product(to(gemm.device, a), to(gemm.device, w), ends_E)

    assert found_XO.dtype == torch.bfloat16
    groups = map(sums, rows_XI.split(sizes), weight_EOI)
    gemm.check(found_XO, *map(torch.cat, zip(*groups, strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_weights_sum_over_their_groups_rows(gemm: Gemm, case: str) -> None:
    sizes, output, width = CASES[case]
    a, gradients = random_columns(output, sizes)
    b, inputs = random_columns(width, sizes)
    ends_E = ends_of(case, gemm.device)

    found_EOI = gemm.run.columns_product(to(gemm.device, a), to(gemm.device, b), ends_E, sum(sizes))

    assert found_EOI.dtype == torch.float32
    gemm.check(found_EOI, *map(torch.stack, zip(*map(sums, gradients, inputs), strict=True)))


def test_products_of_the_other_types_and_bit_by_bit_again(gemm: Gemm) -> None:
    sizes, ends_E = [2, 0, 130], torch.tensor([2, 2, 132], dtype=torch.int32, device=gemm.device)
    a, w = (to(gemm.device, blocks) for blocks in (random_rows(132, 144)[0], random_weights(3, 48, 144)[0]))
    c, d = (to(gemm.device, random_columns(width, sizes)[0]) for width in (48, 144))
    for run in (
        lambda dtype: gemm.run.rows_product(a, w, ends_E, dtype),
        lambda dtype: gemm.run.columns_product(c, d, ends_E, 132, dtype),
    ):
        wide, short = run(torch.float32), run(torch.bfloat16)
        assert (wide.dtype, short.dtype) == (torch.float32, torch.bfloat16)
        gemm.check(short, wide.cpu().double(), wide.cpu().double().abs())
        assert torch.equal(run(torch.bfloat16), short)


def test_a_scale_that_is_not_finite_spoils_its_own_row_only(gemm: Gemm) -> None:
    """As the quantizers write it for numbers that are not finite; blocks of zeros have the smallest scale."""
    sizes, ends_E = [3, 66], torch.tensor([3, 69], dtype=torch.int32, device=gemm.device)
    a, w = random_rows(69, 160)[0], random_weights(2, 48, 160)[0]
    a.values_XD[[1, 5, 68], :128] = 0
    a.scales_XG[[1, 5, 68], 0] = torch.tensor([torch.finfo(torch.float32).tiny, torch.nan, torch.inf])
    found_XO = gemm.run.rows_product(to(gemm.device, a), to(gemm.device, w), ends_E)
    assert found_XO.isfinite().any(1).logical_not().nonzero().flatten().tolist() == [5, 68]
    assert found_XO.isnan().sum() == 2 * 48

    a, b = random_columns(48, sizes)[0], random_columns(160, sizes)[0]
    a.scales_BD[1, 7] = torch.nan  # the block of the second group
    found_EOI = gemm.run.columns_product(to(gemm.device, a), to(gemm.device, b), ends_E, 69)
    assert found_EOI[1, 7].isnan().all()
    assert found_EOI.isnan().sum() == 160


@pytest.mark.parametrize("case", ["empty first, middle and last", "a dense layer"])
def test_a_compiled_graph_holds_products_of_any_size(kernels: Gemm, case: str) -> None:
    sizes, ends_E = CASES[case][0], ends_of(case, kernels.device)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def products(a: RowBlocks, w: WeightBlocks, c: ColumnBlocks, d: ColumnBlocks) -> tuple[Tensor, Tensor]:
        product_XO = kernels.run.rows_product(a, w, ends_E)
        return product_XO * 2, kernels.run.columns_product(c, d, ends_E, len(a.values_XD)) * 2

    a, w = (to(kernels.device, x) for x in (random_rows(sum(sizes), 32)[0], random_weights(len(sizes), 48, 32)[0]))
    c, d = (to(kernels.device, random_columns(width, sizes)[0]) for width in (48, 32))
    found_XO, found_EOI = products(a, w, c, d)
    assert torch.equal(found_XO, 2 * kernels.run.rows_product(a, w, ends_E))
    assert torch.equal(found_EOI, 2 * kernels.run.columns_product(c, d, ends_E, sum(sizes)))


@pytest.mark.gpu
def test_rows_of_more_than_two_to_the_31_numbers(kernels: Gemm) -> None:
    sizes, output, width = [2**18, 77, 0, 5], 8208, 16
    with kernels.device:
        ends_E = torch.tensor(sizes).cumsum(0).int()
        (a, rows_XI), (w, weight_EOI) = random_rows(sum(sizes), width), random_weights(len(sizes), output, width)
    found_XO = kernels.run.rows_product(a, w, ends_E)
    assert found_XO.numel() > 2**31
    assert not found_XO.isnan().any()
    for group, rows in ((0, slice(2**18 - 50, 2**18)), (1, slice(2**18, 2**18 + 77)), (3, slice(-5, None))):
        product, largest = sums(rows_XI[rows], weight_EOI[group])
        kernels.check(found_XO[rows], product, largest)


@pytest.mark.gpu
def test_weights_of_more_than_two_to_the_31_numbers(kernels: Gemm) -> None:
    sizes = [3] * 31 + [0, 150]
    with kernels.device:
        ends_E = torch.tensor(sizes).cumsum(0).int()
        (a, gradients), (b, inputs) = (random_columns(width, sizes) for width in (8208, 8192))
    found_EOI = kernels.run.columns_product(a, b, ends_E, sum(sizes))
    assert found_EOI.numel() > 2**31
    assert not found_EOI.isnan().any()
    assert found_EOI[31].eq(0).all()
    product, largest = sums(gradients[32][-100:], inputs[32])
    kernels.check(found_EOI[32, -100:], product, largest)


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

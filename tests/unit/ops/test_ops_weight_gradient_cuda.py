"""The CUDA C++ kernel of the experts' weight gradients, run by an emulation of a thread block on the CPU.

It shows wrong indices, masks and barriers. `pytest -m gpu` runs the kernel itself.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.grouped_gemm import reference
from helpers.emulated_kernels import emulated_kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_kernel(tmp_path_factory.mktemp("kernels"), "grouped_gemm", "weight_gradient", {})


def operands(sizes: list[int], behind: int, *widths: int) -> tuple[list[Tensor], Tensor]:
    """Rows of random numbers, of which `behind` belong to no group and are NaN, and the ends of the groups."""
    torch.manual_seed(0)
    ends_E = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    rows = [torch.randn(sum(sizes) + behind, width).bfloat16() for width in widths]
    for each in rows:
        each[sum(sizes) :] = torch.nan
    return rows, ends_E


def weight_gradient(kernel: ctypes.CDLL, grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor, blocks: int = 2) -> Tensor:
    """Runs the kernel with a number of thread blocks; the result is NaN before."""
    sizes = len(x_XI), len(ends_E), grad_XO.shape[1], x_XI.shape[1]
    grad_EOI = torch.full(sizes[1:], torch.nan)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (grad_XO, x_XI, ends_E, grad_EOI)]
    kernel.run(ctypes.c_int(blocks), *pointers, *map(ctypes.c_int, sizes))
    return grad_EOI


def check(found: Tensor, grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> None:
    """Compares a result with float64; float32 sums err by 2⁻²⁴ of the magnitudes for each of their rows."""
    exact = reference.weight_gradient(grad_XO.double(), x_XI.double(), ends_E)
    magnitudes = reference.weight_gradient(grad_XO.double().abs(), x_XI.double().abs(), ends_E)
    assert bool(((found - exact).abs() <= 2.0**-24 * len(x_XI) * magnitudes).all())


@pytest.mark.parametrize(
    ("sizes", "behind"),
    [
        ([1], 0),
        ([64], 0),
        ([63, 65, 1], 0),
        ([0, 130, 0, 0, 17, 0], 0),
        ([0, 0, 400], 0),
        ([33, 80], 100),
        ([0, 0], 3),
    ],
    ids=str,
)
def test_groups_of_any_size(kernel: ctypes.CDLL, sizes: list[int], behind: int) -> None:
    (grad_XO, x_XI), ends_E = operands(sizes, behind, 40, 72)
    found = weight_gradient(kernel, grad_XO, x_XI, ends_E)
    check(found, grad_XO, x_XI, ends_E)
    assert all(found[group].eq(0).all() for group, size in enumerate(sizes) if not size)


@pytest.mark.parametrize(("out", "width"), [(8, 8), (128, 256), (136, 24), (16, 264), (264, 520), (8, 2312)])
def test_widths_that_do_not_fill_a_tile(kernel: ctypes.CDLL, out: int, width: int) -> None:
    (grad_XO, x_XI), ends_E = operands([70, 5], 2, out, width)
    check(weight_gradient(kernel, grad_XO, x_XI, ends_E, blocks=3), grad_XO, x_XI, ends_E)


def test_no_bit_depends_on_the_number_of_blocks(kernel: ctypes.CDLL) -> None:
    (grad_XO, x_XI), ends_E = operands([290, 0, 31], 0, 136, 264)  # three times four tiles
    one = weight_gradient(kernel, grad_XO, x_XI, ends_E, blocks=1)
    check(one, grad_XO, x_XI, ends_E)
    assert all(one.equal(weight_gradient(kernel, grad_XO, x_XI, ends_E, blocks)) for blocks in (5, 14))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 100])
def test_no_row_of_another_group_counts(kernel: ctypes.CDLL, size: int) -> None:
    """Not even one of NaN or infinity, before the group or behind it."""
    (grad_XO, x_XI), ends_E = operands([size, size, size], 0, 40, 72)
    alone = slice(size, 2 * size)
    expected = weight_gradient(kernel, grad_XO[alone].contiguous(), x_XI[alone].contiguous(), ends_E[:1])
    for rows in (grad_XO, x_XI):
        rows[:size], rows[2 * size :] = torch.nan, torch.inf
    assert weight_gradient(kernel, grad_XO, x_XI, ends_E)[1].equal(expected[0])

"""Operations on many tensors: the kernel that finds them by address against plain torch, tensor by tensor."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.multi_tensor import AdamWStep, reference

SIZES = [1, 4096, 4097, 0, 10_000, 3, 12_288]
STEP = AdamWStep(decay=0.999, size=0.013, correction=2.5, beta1=0.9, beta2=0.95, eps=1e-8)


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[Any, torch.device]:
    """The kernels and where they run: on a GPU, or line by line on a CPU."""
    from deepseek_v3.ops.multi_tensor import triton

    return triton, triton_device


def tensors(device: torch.device, dtype: torch.dtype = torch.float32, shift: int = 0) -> list[Tensor]:
    """Random ones, `shift` numbers behind where memory is aligned."""
    return [torch.randn(size + shift, device=device).to(dtype)[shift:] for size in SIZES]


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_one_kernel_updates_as_plain_torch_does(
    kernels: tuple[Any, torch.device], moments: torch.dtype, shift: int
) -> None:
    ops, device = kernels
    parameters, gradients = tensors(device, shift=shift), tensors(device, shift=shift)
    means = tensors(device, moments, shift)
    squares = [tensor.abs() for tensor in tensors(device, moments, shift)]
    given = [parameters, gradients, means, squares]
    expected = [[tensor.cpu().clone() for tensor in each] for each in given]
    scale = torch.tensor(0.37, device=device)

    ops.adamw_(*given, scale, STEP)
    reference.adamw_(*expected, scale.cpu(), STEP)

    for found, wanted in zip(given, expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            tolerance = 1e-2 if other.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=2e-6)


def test_rounding_of_moments_is_that_of_torch(kernels: tuple[Any, torch.device]) -> None:
    """Where no arithmetic can differ: β = 0.5, whole gradients, moments of 0."""
    ops, device = kernels
    step = STEP._replace(beta1=0.5, beta2=0.5)
    parameters = [torch.zeros(1000, device=device)]
    gradients = [torch.randint(1, 1 << 20, (1000,), device=device).float()]
    moments = [[torch.zeros(1000, dtype=torch.bfloat16, device=device)] for _ in range(2)]
    ops.adamw_(parameters, gradients, *moments, torch.ones((), device=device), step)
    assert torch.equal(moments[0][0], (gradients[0] / 2).bfloat16())
    assert torch.equal(moments[1][0], (gradients[0].square() / 2).bfloat16())


@pytest.mark.gpu
def test_aligned_tensors_are_moved_four_numbers_at_a_time() -> None:
    """Where the compiler does not know that sizes are multiples of 4 it moves single numbers, at half the speed."""
    from deepseek_v3.ops.multi_tensor import triton as module

    whole = torch.zeros(1, dtype=torch.int64, device="cuda")
    tables, one = (whole, whole.int(), whole, whole), whole.float()
    rest = (1, module._TYPES[torch.float32], True, module._BLOCK)
    update = module._adamw_kernel.warmup(*tables, one, one, one, *[0.5] * 6, *rest, grid=(1,), num_warps=8)
    squares = module._squares_kernel.warmup(*tables, one, one, True, module._BLOCK, grid=(1,), num_warps=8)
    for kernel in (update, squares):
        assert re.search(r"ld\.global\S*\.v4", kernel.asm["ptx"])
    assert re.search(r"st\.global\S*\.v4", update.asm["ptx"])


def test_nothing_outside_the_tensors_is_touched(kernels: tuple[Any, torch.device]) -> None:
    ops, device = kernels
    memory = [torch.full((3, 5001), torch.nan, device=device) for _ in range(4)]
    for whole in memory:
        whole[1] = 0.5
    ops.adamw_(*([whole[1]] for whole in memory), torch.ones((), device=device), STEP)
    for whole in memory:
        assert whole[1].isfinite().all()
        assert whole[[0, 2]].isnan().all()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_nan_changes_nothing(kernels: tuple[Any, torch.device], moments: torch.dtype) -> None:
    ops, device = kernels
    parameters, gradients = tensors(device), [torch.full((size,), torch.nan, device=device) for size in SIZES]
    means, squares = tensors(device, moments), tensors(device, moments)
    given = [parameters, gradients, means, squares]
    before = [[tensor.clone() for tensor in each] for each in (parameters, means, squares)]
    step = STEP._replace(size=torch.tensor(torch.inf, device=device), correction=torch.tensor(2.5, device=device))
    ops.adamw_(*given, torch.tensor(torch.nan, device=device), step)
    for found, expected in zip((parameters, means, squares), before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_factors_may_be_numbers_or_tensors(kernels: tuple[Any, torch.device]) -> None:
    ops, device = kernels
    factors = {"size": torch.tensor(STEP.size, device=device), "correction": torch.tensor(2.5, device=device)}
    results = []
    for step in (STEP, STEP._replace(**factors)):
        torch.manual_seed(0)
        given = [tensors(device) for _ in range(3)]
        ops.adamw_(*given, [tensor.abs() for tensor in tensors(device)], torch.tensor(0.37, device=device), step)
        results.append(given[0])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_squares_are_weighed_by_tensor(kernels: tuple[Any, torch.device]) -> None:
    ops, device = kernels
    given = tensors(device)
    weights = [1.0, 0.5, 0.25, 1.0, 2.0, 0.125, 1.0]
    exact = sum(w * float(t.double().square().sum()) for t, w in zip(given, weights, strict=True))
    for add_up, where in ((ops.sum_of_squares, device), (reference.sum_of_squares, torch.device("cpu"))):
        found = add_up([tensor.to(where) for tensor in given], weights)
        assert (found.ndim, found.dtype) == (0, torch.float32)
        assert float(found) == pytest.approx(exact, rel=1e-6)


def test_gradients_of_other_types_and_strides_are_taken(kernels: tuple[Any, torch.device]) -> None:
    ops, device = kernels
    results = []
    gradient = torch.randn(40, 30, device=device).bfloat16()
    for given in (gradient.float(), gradient, gradient.T.contiguous().T):
        parameter, mean, square = (torch.zeros(40, 30, device=device) for _ in range(3))
        ops.adamw_([parameter], [given], [mean], [square], torch.ones((), device=device), STEP)
        results.append(parameter)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])

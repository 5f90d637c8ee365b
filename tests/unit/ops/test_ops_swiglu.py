"""The kernels of the experts' activation against the formula in float64: result, and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.swiglu import packed_swiglu

SHAPES = [(1, 1), (5, 40), (70, 24), (9, 1024), (3, 1100), (2, 2048)]


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor], torch.device]:
    from deepseek_v3.ops.swiglu import triton

    return triton.packed_swiglu, triton_device


def rows_weights_upstream(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates from -12 to 12: from where the sigmoid is almost 0 to where it is almost 1."""
    gate_up_XG = (6 * torch.randn(rows, 2 * width, device=device)).clamp(-12, 12).to(dtype).requires_grad_()
    weights_X = torch.rand(rows, device=device, requires_grad=True)
    return gate_up_XG, weights_X, torch.randn(rows, width, device=device).to(dtype)


def exact(gate_up_XG: Tensor, weights_X: Tensor, upstream_XF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients, in float64, by the formula."""
    wide_XG, wide_X = (x.detach().double().requires_grad_() for x in (gate_up_XG, weights_X))
    gate_XF, up_XF = wide_XG.chunk(2, dim=-1)
    result_XF = gate_XF / (1 + torch.exp(-gate_XF)) * up_XF * wide_X[:, None]
    return result_XF.detach(), *torch.autograd.grad(result_XF, (wide_XG, wide_X), upstream_XF.double())


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """In bfloat16 half a unit in the last place."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_the_reference_is_the_formula() -> None:
    tensors = rows_weights_upstream(5, 7, torch.float64, torch.device("cpu"))
    result_XF = packed_swiglu(*tensors[:2])
    gradients = torch.autograd.grad(result_XF, tensors[:2], tensors[2])
    for found, expected in zip((result_XF, *gradients), exact(*tensors), strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_result_and_gradients_are_those_of_float64(
    kernels: tuple[Callable[[Tensor, Tensor], Tensor], torch.device], rows: int, width: int, dtype: torch.dtype
) -> None:
    swiglu, device = kernels
    gate_up_XG, weights_X, upstream_XF = rows_weights_upstream(rows, width, dtype, device)
    result_XF = swiglu(gate_up_XG, weights_X)
    gradient_XG, gradient_X = torch.autograd.grad(result_XF, (gate_up_XG, weights_X), upstream_XF)
    expected_XF, expected_XG, expected_X = exact(gate_up_XG, weights_X, upstream_XF)
    check(result_XF, expected_XF, dtype)
    check(gradient_XG, expected_XG, dtype)
    scale = expected_XF.abs().max() * width**0.5  # a sum of numbers that cancel
    assert gradient_X.dtype == torch.float32
    torch.testing.assert_close(gradient_X.double() / scale, expected_X / scale, rtol=1e-5, atol=1e-6)


def test_rows_may_lie_apart(kernels: tuple[Callable[[Tensor, Tensor], Tensor], torch.device]) -> None:
    """Rows and upstream gradients in memory full of NaN; the weights of every second row."""
    swiglu, device = kernels
    tensors = rows_weights_upstream(4, 6, torch.float32, device)
    memory = [torch.full((9, 20), torch.nan, device=device) for _ in range(2)]
    apart_XG, apart_XF = memory[0][1:5, 2:14], memory[1][1:5, 3:9]
    apart_XG.copy_(tensors[0].detach())
    apart_XF.copy_(tensors[2])
    every_second_X = tensors[1].detach().repeat_interleave(2)[::2].requires_grad_()
    result_XF = swiglu(apart_XG.requires_grad_(), every_second_X)
    gradients = torch.autograd.grad(result_XF, (apart_XG, every_second_X), apart_XF)
    for found, expected in zip((result_XF, *gradients), exact(*tensors), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_make_no_result(kernels: tuple[Callable[[Tensor, Tensor], Tensor], torch.device]) -> None:
    swiglu, device = kernels
    gate_up_XG, weights_X, upstream_XF = rows_weights_upstream(0, 8, torch.bfloat16, device)
    result_XF = swiglu(gate_up_XG, weights_X)
    gradients = torch.autograd.grad(result_XF, (gate_up_XG, weights_X), upstream_XF)
    assert [x.shape for x in (result_XF, *gradients)] == [(0, 8), (0, 16), (0,)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_keeps_the_kernels(
    kernels: tuple[Callable[[Tensor, Tensor], Tensor], torch.device], dynamic: bool
) -> None:
    swiglu, device = kernels
    compiled = torch.compile(
        lambda rows, weights: swiglu(rows * 0.5, weights) * 2,
        fullgraph=True,
        dynamic=dynamic,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    for rows in (3, 5):
        gate_up_XG, weights_X, upstream_XF = rows_weights_upstream(rows, 16, torch.float32, device)
        result_XF = compiled(2 * gate_up_XG, weights_X)
        gradients = torch.autograd.grad(result_XF, (gate_up_XG, weights_X), 0.5 * upstream_XF)
        for found, expected, factor in zip(
            (result_XF, *gradients), exact(gate_up_XG, weights_X, upstream_XF), (2, 1, 1), strict=True
        ):
            torch.testing.assert_close(found.double(), factor * expected, rtol=1e-5, atol=1e-4)

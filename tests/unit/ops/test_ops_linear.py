"""The product of a linear layer whose weight's gradient stays in float32, against float64."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.linear import LINEAR, linear, wide_gradient_linear
from deepseek_v3.ops.operation import Target


def rows_weight_upstream(device: torch.device, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*sizes, 24, device=device).bfloat16().requires_grad_()
    weight_OI = torch.randn(16, 24, device=device, requires_grad=True)
    return x, weight_OI, torch.randn(*sizes, 16, device=device).bfloat16()


@pytest.mark.parametrize("sizes", [(2, 3), (50,), (0, 4)], ids=str)
def test_the_weight_s_gradient_is_not_rounded(sizes: tuple[int, ...], device: torch.device) -> None:
    x, weight_OI, upstream = rows_weight_upstream(device, *sizes)
    result = wide_gradient_linear(x, weight_OI)
    grad_x, grad_weight_OI = torch.autograd.grad(result, (x, weight_OI), upstream)

    plain = linear(x, weight_OI)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, plain)
    assert torch.equal(grad_x, torch.autograd.grad(plain, x, upstream)[0])
    expected_OI = upstream.double().flatten(0, -2).T @ x.detach().double().flatten(0, -2)
    torch.testing.assert_close(grad_weight_OI, expected_OI.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [0, 1], ids=["rows", "weight"])
def test_one_side_may_need_no_gradient(needed: int, device: torch.device) -> None:
    x, weight_OI, upstream = rows_weight_upstream(device, 5)
    inputs = [x, weight_OI]
    expected = torch.autograd.grad(wide_gradient_linear(*inputs), inputs, upstream)[needed]
    inputs[1 - needed] = inputs[1 - needed].detach()
    (found,) = torch.autograd.grad(wide_gradient_linear(*inputs), inputs[needed], upstream)
    assert torch.equal(found, expected)


def test_a_compiled_graph_computes_the_same(device: torch.device) -> None:
    x, weight_OI, upstream = rows_weight_upstream(device, 5)
    compiled = torch.compile(
        lambda x, weight: wide_gradient_linear(x, weight),
        fullgraph=True,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    found = torch.autograd.grad(compiled(x, weight_OI), (x, weight_OI), upstream)
    expected = torch.autograd.grad(wide_gradient_linear(x, weight_OI), (x, weight_OI), upstream)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_equal_types_and_passes_without_gradient_are_plain(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight_OI, _ = rows_weight_upstream(torch.device("cpu"), 5)
    narrow, weight = x.detach().to(dtypes[0]), weight_OI.detach().to(dtypes[1]).requires_grad_()
    assert "Linear" not in type(wide_gradient_linear(narrow, weight).grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(wide_gradient_linear(x, weight_OI), linear(x, weight_OI))


def test_it_is_for_bfloat16_on_a_gpu() -> None:
    assert LINEAR.select(Target(torch.device("cuda"), torch.bfloat16)).backend == "wide_gradient"
    selection = LINEAR.select(Target(torch.device("cuda"), torch.float32))
    assert str(selection) == "linear reference (wide_gradient needs bfloat16)"

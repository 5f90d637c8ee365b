"""Products of experts whose weights' gradients stay in float32, against today's products and against float64."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.grouped_gemm import torch_grouped_linear, wide_gradient_grouped_linear
from deepseek_v3.ops.grouped_gemm.cuda.check import agree

SIZES = [3, 0, 70, 5]


def rows_weight_upstream(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, a weight of this type, the ends of the groups, and the gradient of the result."""
    x_XI = torch.randn(sum(SIZES), 16, device=device).bfloat16().requires_grad_()
    weight_EOI = torch.randn(len(SIZES), 24, 16, device=device).to(dtype).requires_grad_()
    ends_E = torch.tensor(SIZES, device=device).cumsum(0, dtype=torch.int32)
    return x_XI, weight_EOI, ends_E, torch.randn(sum(SIZES), 24, device=device).bfloat16()


def test_the_experts_gradient_is_not_rounded(device: torch.device) -> None:
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    result_XO = wide_gradient_grouped_linear(x_XI, weight_EOI, ends_E)
    grad_XI, grad_EOI = torch.autograd.grad(result_XO, (x_XI, weight_EOI), upstream_XO)

    plain_XO = torch_grouped_linear(x_XI, weight_EOI, ends_E)
    plain_XI, plain_EOI = torch.autograd.grad(plain_XO, (x_XI, weight_EOI), upstream_XO)
    assert torch.equal(result_XO, plain_XO)
    assert torch.equal(grad_XI, plain_XI)
    assert agree(grad_EOI, upstream_XO, x_XI.detach(), ends_E)
    assert torch.allclose(grad_EOI, plain_EOI, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("needed", [0, 1], ids=["rows", "weight"])
def test_one_side_may_need_no_gradient(needed: int, device: torch.device) -> None:
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    inputs = [x_XI, weight_EOI]
    result_XO = wide_gradient_grouped_linear(*inputs, ends_E)
    expected = torch.autograd.grad(result_XO, inputs, upstream_XO)[needed]
    inputs[1 - needed] = inputs[1 - needed].detach()
    result_XO = wide_gradient_grouped_linear(*inputs, ends_E)
    (found,) = torch.autograd.grad(result_XO, inputs[needed], upstream_XO)
    assert torch.equal(found, expected)


def test_a_weight_used_twice_has_the_sum_of_both(device: torch.device) -> None:
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    once_XO, again_XO = (wide_gradient_grouped_linear(x_XI, weight_EOI, ends_E) for _ in range(2))
    (once_EOI,) = torch.autograd.grad(once_XO, weight_EOI, upstream_XO, retain_graph=True)
    (found_EOI,) = torch.autograd.grad(once_XO + again_XO, weight_EOI, upstream_XO)
    assert torch.equal(found_EOI, 2 * once_EOI)


def test_the_gradient_of_the_result_may_lie_apart(device: torch.device) -> None:
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    result_XO = wide_gradient_grouped_linear(x_XI, weight_EOI, ends_E)
    inputs = x_XI, weight_EOI
    expected = torch.autograd.grad(result_XO, inputs, upstream_XO, retain_graph=True)
    found = torch.autograd.grad(result_XO, inputs, upstream_XO.T.contiguous().T)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_computes_the_same(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    compiled = torch.compile(
        lambda x, weight, ends: wide_gradient_grouped_linear(x, weight, ends),
        fullgraph=True,
        dynamic=dynamic,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    found = torch.autograd.grad(compiled(x_XI, weight_EOI, ends_E), (x_XI, weight_EOI), upstream_XO)
    result_XO = wide_gradient_grouped_linear(x_XI, weight_EOI, ends_E)
    expected = torch.autograd.grad(result_XO, (x_XI, weight_EOI), upstream_XO)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_bfloat16_weights_and_no_gradient_are_plain(device: torch.device) -> None:
    """As under FSDP, which gathers weights in bfloat16."""
    x_XI, weight_EOI, ends_E, _ = rows_weight_upstream(device, torch.bfloat16)
    result_XO = wide_gradient_grouped_linear(x_XI, weight_EOI, ends_E)
    assert "GroupedLinear" not in type(result_XO.grad_fn).__name__
    with torch.no_grad():
        wide_XO = wide_gradient_grouped_linear(x_XI, weight_EOI.float(), ends_E)
    assert torch.equal(wide_XO, result_XO)


def test_no_rows_give_zeros(device: torch.device) -> None:
    x_XI, weight_EOI, ends_E, upstream_XO = rows_weight_upstream(device)
    result_XO = wide_gradient_grouped_linear(x_XI[:0], weight_EOI, 0 * ends_E)
    assert torch.autograd.grad(result_XO, weight_EOI, upstream_XO[:0])[0].eq(0).all()

"""The CUDA C++ kernel of the experts' weight gradients on a Hopper GPU."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.grouped_gemm import GROUPED_GEMM, GroupedLinear, cuda, torch_grouped_linear
from deepseek_v3.ops.grouped_gemm.cuda.check import agree, check
from deepseek_v3.ops.moe_permute import sort_by_expert
from deepseek_v3.ops.operation import Target
from helpers.experts import fill_new_memory_with_nan
from helpers.models import fill_with_noise, small_config

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def device() -> torch.device:
    target = Target(torch.device("cuda", torch.cuda.current_device()), BF16, (64, 64))
    if obstacle := GROUPED_GEMM.backends["cuda"].obstacle(target):
        pytest.skip(f"cuda {obstacle}")
    return target.device


def rows_of(device: torch.device, sizes: list[int], behind: int, *widths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two operands, whose last `behind` rows belong to no group and are NaN, and the ends of the groups."""
    ends_E = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    grad_XO, x_XI = (torch.randn(sum(sizes) + behind, width, device=device, dtype=BF16) for width in widths)
    grad_XO[sum(sizes) :] = x_XI[sum(sizes) :] = torch.nan
    return grad_XO, x_XI, ends_E


def test_the_check_of_the_build(device: torch.device) -> None:
    with fill_new_memory_with_nan():
        assert [name for name, holds in check(device) if not holds] == []


@pytest.mark.parametrize("sizes", [[1], [64, 0, 64], [63, 65, 129, 0], [0, 0, 1000], [5] * 30], ids=len)
@pytest.mark.parametrize("widths", [(8, 8), (136, 264), (1024, 512), (2056, 4104)], ids=str)
def test_groups_and_widths(sizes: list[int], widths: tuple[int, int], device: torch.device) -> None:
    given = rows_of(device, sizes, 70, *widths)
    with fill_new_memory_with_nan():
        found_EOI = cuda.weight_gradient(*given)
    assert agree(found_EOI, *given)
    assert torch.equal(cuda.weight_gradient(*given), found_EOI)


def test_random_groups(device: torch.device) -> None:
    """Rows of other groups are infinite or NaN where only one group is compared."""
    for _ in range(50):
        sizes = (torch.rand(20) ** 3 * 300).int().tolist()
        grad_XO, x_XI, ends_E = rows_of(device, sizes, 9, 200, 328)
        found_EOI = cuda.weight_gradient(grad_XO, x_XI, ends_E)
        assert agree(found_EOI, grad_XO, x_XI, ends_E)
        start, end = ends_E[9].item(), ends_E[10].item()
        for rows in (grad_XO, x_XI):
            rows[:start], rows[end:] = torch.nan, torch.inf
        assert torch.equal(cuda.weight_gradient(grad_XO, x_XI, ends_E)[10], found_EOI[10])


def test_many_repetitions_give_the_same_bits(device: torch.device) -> None:
    """A stage that is copied to too early shows here, if anywhere."""
    given = rows_of(device, [700, 1500, 0, 900], 0, 2048, 1536)
    first_EOI = cuda.weight_gradient(*given)
    assert all(torch.equal(cuda.weight_gradient(*given), first_EOI) for _ in range(200))


def test_more_than_two_to_the_31_numbers(device: torch.device) -> None:
    sizes = [3] * 31 + [0, 150]
    grad_XO, x_XI, ends_E = rows_of(device, sizes, 0, 8208, 8192)
    found_EOI = cuda.weight_gradient(grad_XO, x_XI, ends_E)
    assert found_EOI.numel() > 2**31
    assert not found_EOI.isnan().any()
    assert found_EOI[31].eq(0).all()
    last = torch.tensor([150], device=device, dtype=torch.int32)
    assert agree(found_EOI[32:, -100:], grad_XO[-150:, -100:], x_XI[-150:], last)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_experts_have_the_gradients_of_before(compiled: bool, device: torch.device) -> None:
    """But for their rounding to bfloat16."""
    config = small_config(hidden_size=128, moe_intermediate_size=64)
    experts = RoutedExperts(config)
    fill_with_noise(experts)
    experts.to(device)
    chosen_TK = torch.rand(300, config.n_routed_experts - 1, device=device).topk(2).indices  # one has no tokens
    order = sort_by_expert(chosen_TK, config.n_routed_experts)
    x_RD = torch.randn(300, 128, device=device, dtype=BF16, requires_grad=True)
    gates_X = torch.rand(600, device=device)

    def gradients(grouped_linear: GroupedLinear) -> tuple[Tensor, ...]:
        torch._dynamo.reset()
        experts.grouped_linear = grouped_linear
        run = torch.compile(experts, fullgraph=True, dynamic=False) if compiled else experts
        result_RD = run(x_RD, gates_X, order.copies(), order.ends_E)
        weights = experts.gate_up_proj, experts.down_proj
        return torch.autograd.grad(result_RD.float().square().sum(), (x_RD, *weights))

    found, before = gradients(GROUPED_GEMM.backends["cuda"].load()), gradients(torch_grouped_linear)
    assert [each.dtype for each in found] == [BF16, torch.float32, torch.float32]
    for one, other in zip(found, before, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-8, atol=1e-3 * other.abs().max().item())

"""Products per expert and the way to expert order and back, against loops over rows."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from deepseek_v3.ops.grouped_gemm import (
    GroupedLinear,
    fastest_grouped_linear,
    reference_grouped_linear,
    torch_grouped_linear,
)
from deepseek_v3.ops.moe_permute import permute, reference, sort_by_expert, unpermute
from helpers import largest_difference

BACK_ENDS = [reference_grouped_linear, torch_grouped_linear]
GROUPS = {
    "uneven": [3, 1, 7, 5],
    "empty first, middle and last": [0, 5, 0, 9, 0],
    "all rows in one": [0, 0, 11, 0],
    "all rows in the last": [0, 0, 0, 6],
    "one group": [4],
}
CHOICES = {
    "random": [[3, 0], [1, 3], [2, 1], [3, 2], [0, 3]],
    "all to one": [[2], [2], [2], [2]],
    "an expert without tokens": [[0, 3], [3, 0], [0, 1]],
    "one token": [[3, 1, 0]],
}
EXPERTS = 4


def one_row_at_a_time(x_XI: Tensor, weight_EOI: Tensor, sizes: list[int]) -> Tensor:
    experts_X = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([weight_EOI[expert] @ row for expert, row in zip(experts_X, x_XI, strict=True)])


def rows_and_weights(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and the ends of the groups; widths are multiples of 16 bytes."""
    x_XI = torch.randn(sum(sizes), 16, dtype=dtype, device=device, requires_grad=True)
    weight_EOI = torch.randn(len(sizes), 24, 16, dtype=dtype, device=device, requires_grad=True)
    ends_E = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    return x_XI, weight_EOI, ends_E


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("grouped_linear", BACK_ENDS, ids=["loop", "grouped kernel"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_every_row_meets_the_weight_of_its_group(
    groups: str, grouped_linear: GroupedLinear, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    sizes = GROUPS[groups]
    x_XI, weight_EOI, ends_E = rows_and_weights(sizes, dtype, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in (x_XI, weight_EOI)]
    expected = one_row_at_a_time(*exact_inputs, sizes)
    upstream = torch.randn_like(expected)

    found = grouped_linear(x_XI, weight_EOI, ends_E)

    assert found.dtype == dtype
    gradients = torch.autograd.grad(found, (x_XI, weight_EOI), upstream.to(dtype))
    exact_gradients = torch.autograd.grad(expected, exact_inputs, upstream.to(dtype).double())
    for one, exact in zip((found, *gradients), (expected, *exact_gradients), strict=True):
        assert largest_difference(one.double(), exact) < tolerance * exact.abs().max()
    assert all(gradients[1][group].eq(0).all() for group, size in enumerate(sizes) if not size)


@pytest.mark.parametrize("grouped_linear", BACK_ENDS, ids=["loop", "grouped kernel"])
def test_float32_weights_compute_in_the_type_of_the_rows(
    grouped_linear: GroupedLinear, device: torch.device
) -> None:
    sizes = [3, 0, 5]
    x_XI, weight_EOI, ends_E = rows_and_weights(sizes, torch.float32, device)
    found = grouped_linear(x_XI.bfloat16(), weight_EOI, ends_E)
    assert found.dtype == torch.bfloat16
    expected = one_row_at_a_time(x_XI, weight_EOI, sizes)
    assert largest_difference(found.float(), expected) < 0.05 * expected.abs().max()
    (gradient,) = torch.autograd.grad(found, weight_EOI, torch.ones_like(found))
    assert gradient.dtype == torch.float32


def test_the_fastest_product_on_a_cpu_is_the_loop() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert fastest_grouped_linear(torch.device("cpu"), dtype) is reference_grouped_linear


@pytest.mark.parametrize("choice", CHOICES)
def test_copies_line_up_by_expert_then_by_token(choice: str, device: torch.device) -> None:
    chosen = CHOICES[choice]
    pairs = [(expert, token) for token, experts in enumerate(chosen) for expert in experts]

    order = sort_by_expert(torch.tensor(chosen, device=device), EXPERTS)

    assert [pairs[place] for place in order.order_X.tolist()] == sorted(pairs)
    assert order.order_X[order.inverse_X].tolist() == list(range(len(pairs)))
    assert order.ends_E.tolist() == [sum(expert <= e for expert, _ in pairs) for e in range(EXPERTS)]
    assert order.ends_E.dtype == torch.int32


@pytest.mark.parametrize("choice", CHOICES)
def test_there_and_back_equals_the_reference(choice: str, device: torch.device) -> None:
    chosen = torch.tensor(CHOICES[choice], device=device)
    tokens, copies = chosen.shape
    order = sort_by_expert(chosen, EXPERTS)
    x_TD = torch.randn(tokens, 5, dtype=torch.float64, device=device, requires_grad=True)
    factor_X1 = torch.randn(tokens * copies, 1, dtype=torch.float64, device=device)

    rows_XD = permute(x_TD, order)
    y_TD = unpermute(rows_XD * factor_X1, order, tokens)

    expected_rows_XD = reference.permute(x_TD, order)
    expected_y_TD = reference.unpermute(expected_rows_XD * factor_X1, order, tokens)
    assert torch.equal(rows_XD, expected_rows_XD)
    assert torch.allclose(y_TD, expected_y_TD, rtol=0, atol=1e-14)
    upstream_TD = torch.randn_like(y_TD)
    (gradient,) = torch.autograd.grad(y_TD, x_TD, upstream_TD)
    (expected_gradient,) = torch.autograd.grad(expected_y_TD, x_TD, upstream_TD)
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-13)


def test_there_and_back_counts_every_copy() -> None:
    order = sort_by_expert(torch.tensor(CHOICES["random"]), EXPERTS)
    x_TD = torch.randn(5, 3)
    assert torch.equal(unpermute(permute(x_TD, order), order, 5), 2 * x_TD)


@pytest.mark.parametrize("choice", CHOICES)
def test_permutation_gradients(choice: str) -> None:
    chosen = torch.tensor(CHOICES[choice])
    order = sort_by_expert(chosen, EXPERTS)
    x_TD = torch.randn(len(chosen), 2, dtype=torch.float64, requires_grad=True)
    rows_XD = torch.randn(chosen.numel(), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: permute(x, order), (x_TD,))
    assert gradcheck(lambda rows: unpermute(rows, order, len(chosen)), (rows_XD,))


def test_copies_are_summed_in_float32_both_ways() -> None:
    """In bfloat16, 256 + 1 would stay 256 at every step."""
    order = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), EXPERTS)
    rows_XD = torch.tensor([[256.0], [1.0], [1.0], [2.0]], dtype=torch.bfloat16)
    assert unpermute(rows_XD, order, 1).item() == 260.0
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(permute(x_TD, order), x_TD, rows_XD)
    assert gradient.item() == 260.0


@pytest.mark.parametrize("where", ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 1), (torch.float32, 1025), (torch.bfloat16, 40)])
def test_sums_of_listed_rows_equal_a_loop(where: str, dtype: torch.dtype, width: int) -> None:
    """Rows that lie apart in memory full of NaN, lists of any length, the empty one among them."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    if where == "interpreted" and torch.cuda.is_available():
        pytest.skip("the same process cannot both interpret and compile")
    sum_rows = import_module("deepseek_v3.ops.moe_permute.triton").sum_rows
    device = torch.device("cuda" if where == "cuda" else "cpu")
    number = 7
    memory = torch.full((number + 1, width + 3), torch.nan, device=device, dtype=dtype)
    rows_XD = memory[:number, :width]
    rows_XD.copy_(torch.randint(-8, 8, (number, width)))
    lists = [[0, 3, 6], [2], [], [5, 5, 1], [6]]
    slots_TM = torch.tensor([[*each, *[number] * (3 - len(each))] for each in lists], device=device)
    found = sum_rows(rows_XD, slots_TM)
    expected = torch.stack([rows_XD[each].float().sum(0) for each in lists])  # whole numbers: no rounding
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected)
    nothing = sum_rows(rows_XD[:0], torch.zeros(4, 3, dtype=torch.int64, device=device))
    assert torch.equal(nothing, torch.zeros(4, width, dtype=dtype, device=device))

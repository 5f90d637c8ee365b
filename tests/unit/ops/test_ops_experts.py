"""Products per expert and the way to expert order and back, against loops over rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from deepseek_v3.ops.grouped_gemm import (
    GroupedLinear,
    reference_grouped_linear,
    torch_grouped_linear,
)
from deepseek_v3.ops.grouped_gemm.reference import weight_gradient
from deepseek_v3.ops.moe_permute import (
    BinOrder,
    ExpertBins,
    RowCopies,
    gather_rows,
    reference,
    sort_by_expert,
    sum_rows,
)
from helpers.models import largest_difference

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
def test_every_row_is_multiplied_by_its_groups_weight(
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


@pytest.mark.parametrize("groups", GROUPS)
def test_a_weight_s_gradient_is_a_sum_of_outer_products(groups: str) -> None:
    """In float32; rows behind the last group may hold anything."""
    sizes = GROUPS[groups]
    x_XI, grad_XO = torch.randn(sum(sizes) + 3, 5).bfloat16(), torch.randn(sum(sizes) + 3, 7).bfloat16()
    x_XI[-3:] = grad_XO[-3:] = torch.nan
    ends_E = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    expected_EOI = torch.zeros(len(sizes), 7, 5, dtype=torch.float64)
    experts_X = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    for row, expert in enumerate(experts_X):
        expected_EOI[expert] += grad_XO[row, :, None].double() * x_XI[row].double()
    found_EOI = weight_gradient(grad_XO, x_XI, ends_E)
    torch.testing.assert_close(found_EOI, expected_EOI.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_are_sorted_by_expert_then_by_token(choice: str, device: torch.device) -> None:
    chosen = CHOICES[choice]
    pairs = [(expert, token) for token, experts in enumerate(chosen) for expert in experts]

    order = sort_by_expert(torch.tensor(chosen, device=device), EXPERTS)

    assert [pairs[place] for place in order.choices_X.tolist()] == sorted(pairs)
    assert order.choices_X[order.places_TK.flatten()].tolist() == list(range(len(pairs)))
    assert order.ends_E.tolist() == [sum(expert <= e for expert, _ in pairs) for e in range(EXPERTS)]
    assert order.ends_E.dtype == torch.int32


@pytest.mark.parametrize("choice", CHOICES)
def test_gathered_and_summed_rows_equal_a_loop(choice: str, device: torch.device) -> None:
    """Outputs and gradients, in float64."""
    chosen = torch.tensor(CHOICES[choice], device=device)
    tokens, per_token = chosen.shape
    order = sort_by_expert(chosen, EXPERTS)
    x_TD = torch.randn(tokens, 5, dtype=torch.float64, device=device, requires_grad=True)
    factor_X1 = torch.randn(tokens * per_token, 1, dtype=torch.float64, device=device)

    rows_XD = gather_rows(x_TD, order.copies())
    y_TD = sum_rows(rows_XD * factor_X1, order.copies())

    expected_rows_XD = torch.stack([x_TD[place // per_token] for place in order.choices_X.tolist()])
    expected_y_TD = torch.stack(
        [sum(rows_XD[place] * factor_X1[place] for place in places) for places in order.places_TK.tolist()]
    )
    assert torch.equal(rows_XD, expected_rows_XD)
    assert torch.allclose(y_TD, expected_y_TD, rtol=0, atol=1e-14)
    upstream_TD = torch.randn_like(y_TD)
    (gradient,) = torch.autograd.grad(y_TD, x_TD, upstream_TD, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected_y_TD, x_TD, upstream_TD)
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-13)


def test_every_copy_is_summed() -> None:
    order = sort_by_expert(torch.tensor(CHOICES["random"]), EXPERTS)
    x_TD = torch.randn(5, 3)
    assert torch.equal(sum_rows(gather_rows(x_TD, order.copies()), order.copies()), 2 * x_TD)


ALL_COPIED = sort_by_expert(torch.tensor(CHOICES["random"]), EXPERTS).copies()
SOME_COPIED = reference.sort_into_bins(torch.tensor(CHOICES["random"]), ExpertBins(1, 1, 2)).copies(4)


@pytest.mark.parametrize("copies", [ALL_COPIED, SOME_COPIED], ids=["all slots used", "unused slots"])
def test_gradients_of_gathered_and_summed_rows(copies: RowCopies) -> None:
    x_TD = torch.randn(len(copies.slots_TM), 2, dtype=torch.float64, requires_grad=True)
    rows_XD = torch.randn(len(copies.source_X), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: gather_rows(x, copies), (x_TD,))
    assert gradcheck(lambda rows: sum_rows(rows, copies), (rows_XD,))


def test_copies_are_summed_in_float32_both_ways() -> None:
    """In bfloat16, 256 + 1 would stay 256 at every step."""
    copies = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), EXPERTS).copies()
    rows_XD = torch.tensor([[256.0], [1.0], [1.0], [2.0]], dtype=torch.bfloat16)
    assert sum_rows(rows_XD, copies).item() == 260.0
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_rows(x_TD, copies), x_TD, rows_XD)
    assert gradient.item() == 260.0


def test_no_tokens_make_no_rows() -> None:
    order = sort_by_expert(torch.zeros(0, 2, dtype=torch.int64), EXPERTS)
    x_TD = torch.zeros(0, 3)
    assert order.ends_E.tolist() == [0] * EXPERTS
    assert sum_rows(gather_rows(x_TD, order.copies()), order.copies()).shape == (0, 3)


def triton_backend(where: str) -> Any:
    """The Triton back end, interpreted on a CPU or compiled for a GPU."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    if where == "interpreted" and torch.cuda.is_available():
        pytest.skip("the same process cannot both interpret and compile")
    from deepseek_v3.ops.moe_permute import triton

    return triton


def check_order(order: BinOrder, choice: list[list[int]], bins: ExpertBins, once: bool) -> None:
    """Compares an order with loops over tokens and bins."""
    chosen, nowhere = len(choice[0]) if choice else 1, sum(map(len, choice))
    runs = [range(bins.first + b * bins.size, bins.first + (b + 1) * bins.size) for b in range(bins.number)]
    there = [
        [(t, k) for t, experts in enumerate(choice) for k, expert in enumerate(experts) if expert in run]
        for run in runs
    ]
    placed = [
        [pair for pair in pairs if not once or (pair[0], pair[1]) == min(p for p in pairs if p[0] == pair[0])]
        for pairs in there
    ]
    places = {pair: place for place, pair in enumerate(pair for pairs in placed for pair in pairs)}
    assert order.counts_B2.tolist() == [[len(few), len(all_)] for few, all_ in zip(placed, there, strict=True)]
    assert order.ends_B.tolist() == [sum(map(len, placed[: b + 1])) for b in range(bins.number)]
    assert order.ends_B.dtype == torch.int32
    number = len(places)
    assert order.copies(number).source_X.tolist() == [t for t, _ in places]
    assert order.copies_of_choices(number).source_X.tolist() == [t * chosen + k for t, k in places]
    expected = [[places.get((t, k), nowhere) for k in range(chosen)] for t in range(len(choice))]
    assert order.places_TK.tolist() == expected


@given(
    first=st.integers(0, 3),
    size=st.integers(1, 3),
    number=st.integers(1, 4),
    others=st.integers(0, 3),
    tokens=st.integers(0, 6),
    once=st.booleans(),
    data=st.data(),
)
def test_choices_are_sorted_into_bins(
    first: int, size: int, number: int, others: int, tokens: int, once: bool, data: st.DataObject
) -> None:
    """Runs of experts before and after the bins belong to other ranks; -1 is an expert of another rank."""
    experts = first + size * number + others
    chosen = data.draw(st.integers(1, experts))
    choice = [data.draw(st.permutations(range(-1, experts)))[:chosen] for _ in range(tokens)]
    bins = ExpertBins(first, size, number)
    order = reference.sort_into_bins(torch.tensor(choice, dtype=torch.int32).view(tokens, chosen), bins, once)
    check_order(order, choice, bins, once)


@pytest.mark.parametrize("where", ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "chosen", "bins"),
    [(1, 1, ExpertBins(0, 1, 1)), (700, 6, ExpertBins(8, 4, 3)), (9, 3, ExpertBins(0, 1, 40))],
)
def test_kernels_sort_choices_as_loops_do(
    where: str, once: bool, dtype: torch.dtype, tokens: int, chosen: int, bins: ExpertBins
) -> None:
    """Tables that lie apart in memory full of what looks like choices; 700 tokens take several programs."""
    backend = triton_backend(where)
    device = torch.device("cuda" if where == "cuda" else "cpu")
    scores_TE = torch.rand(tokens, bins.first + bins.number * bins.size + 5)
    memory = torch.full((tokens + 1, chosen + 2), bins.first, dtype=dtype, device=device)
    experts_TK = memory[:tokens, :chosen]
    experts_TK.copy_(scores_TE.topk(chosen).indices - 1)
    check_order(backend.sort_into_bins(experts_TK, bins, once), experts_TK.tolist(), bins, once)


@pytest.mark.parametrize("where", ["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 1), (torch.float32, 1025), (torch.bfloat16, 40)])
def test_sums_of_listed_rows_equal_a_loop(where: str, dtype: torch.dtype, width: int) -> None:
    """Rows that lie apart in memory full of NaN, lists of any length, the empty one among them."""
    backend = triton_backend(where)
    device = torch.device("cuda" if where == "cuda" else "cpu")
    number = 7
    memory = torch.full((number + 1, width + 3), torch.nan, device=device, dtype=dtype)
    rows_XD = memory[:number, :width]
    rows_XD.copy_(torch.randint(-8, 8, (number, width)))
    lists = [[0, 3, 6], [2], [], [5, 5, 1], [6]]
    slots_TM = torch.tensor([[*each, *[number] * (3 - len(each))] for each in lists], device=device)
    found = backend.sum_rows(rows_XD, slots_TM)
    expected = torch.stack([rows_XD[each].float().sum(0) for each in lists])  # whole numbers: no rounding
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected)
    nothing = backend.sum_rows(rows_XD[:0], torch.zeros(4, 3, dtype=torch.int64, device=device))
    assert torch.equal(nothing, torch.zeros(4, width, dtype=dtype, device=device))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 1), (torch.float32, 1025), (torch.bfloat16, 40)])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_copies_of_rows_equal_an_index(
    triton_device: torch.device, dtype: torch.dtype, width: int, tokens: int
) -> None:
    """Rows that lie apart in memory full of NaN; some have no copy."""
    from deepseek_v3.ops.moe_permute import triton

    memory = torch.full((tokens + 1, width + 3), torch.nan, device=triton_device, dtype=dtype)
    x_TD = memory[1:, :width]
    x_TD.copy_(torch.randn(tokens, width))
    experts_TK = torch.rand(tokens, 9, device=triton_device).topk(3).indices
    order = reference.sort_into_bins(experts_TK, ExpertBins(2, 1, 6))
    copies = order.copies(int(order.counts_B2[:, 0].sum()))
    assert torch.equal(triton.gather_rows(x_TD, copies), x_TD[copies.source_X])

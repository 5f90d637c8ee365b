"""The largest numbers of rows against a stable sort: equal numbers, zeros of both signs, NaN and infinity."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.operation import Target
from deepseek_v3.ops.top_k import TOP_K, TopK, top_k


@pytest.fixture
def kernel(triton_device: torch.device) -> tuple[TopK, torch.device]:
    from deepseek_v3.ops.top_k import triton

    return triton.top_k, triton_device


def scores(rows: int, width: int) -> Tensor:
    """Random numbers, and ten kinds of rows that repeat."""
    scores_TE = torch.randn(rows, width)
    scores_TE[3::10] = 0
    scores_TE[4::10] = -torch.inf
    scores_TE[5::10, ::3] = torch.nan
    scores_TE[6::10, ::3] = -torch.nan
    scores_TE[6::10, 1::3] = torch.inf
    scores_TE[7::10, ::2], scores_TE[7::10, 1::2] = -0.0, 0.0
    scores_TE[8::10] = scores_TE[8::10].round()
    scores_TE[9::10] = -scores_TE[9::10].abs()
    return scores_TE


def sorted_columns(scores_TE: Tensor) -> Tensor:
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize(("width", "k"), [(1, 1), (8, 2), (16, 16), (40, 6), (256, 8), (4096, 3)])
def test_the_kernel_takes_what_a_stable_sort_puts_first(
    kernel: tuple[TopK, torch.device], width: int, k: int
) -> None:
    run, device = kernel
    scores_TE = scores(10 if width > 256 else 61, width)
    found_TK = run(scores_TE.to(device), k)
    assert found_TK.dtype == torch.int64
    assert torch.equal(found_TK.cpu(), sorted_columns(scores_TE)[:, :k])


def test_rows_may_lie_apart(kernel: tuple[TopK, torch.device]) -> None:
    run, device = kernel
    memory = torch.full((31, 20), torch.inf, device=device)
    scores_TE = memory[1:, 3:11]
    scores_TE.copy_(scores(30, 8))
    assert torch.equal(run(scores_TE, 3).cpu(), sorted_columns(scores_TE.cpu())[:, :3])


def test_no_rows_have_no_largest_numbers(kernel: tuple[TopK, torch.device]) -> None:
    run, device = kernel
    assert run(torch.zeros(0, 8, device=device), 3).shape == (0, 3)


def test_the_choice_has_no_gradient(kernel: tuple[TopK, torch.device]) -> None:
    run, device = kernel
    compiled = torch.compile(
        lambda x: x.gather(1, run(x, 2)).sum(),
        fullgraph=True,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    x = torch.tensor([[3.0, 1.0, 2.0]], device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    assert gradient.tolist() == [[1.0, 0.0, 1.0]]


def test_the_reference_takes_the_largest_numbers() -> None:
    scores_TE = scores(40, 16)
    expected = scores_TE.gather(1, sorted_columns(scores_TE)[:, :5])
    torch.testing.assert_close(scores_TE.gather(1, top_k(scores_TE, 5)), expected, rtol=0, atol=0, equal_nan=True)


def test_where_the_kernel_cannot_run_the_reference_does() -> None:
    cuda = torch.device("cuda")
    assert str(TOP_K.select(Target(cuda, torch.float64, (8,)))) == "top_k reference (triton needs float32)"
    wide = TOP_K.select(Target(cuda, torch.bfloat16, (4097,)))
    assert str(wide) == "top_k reference (triton needs rows of at most 4096 numbers)"

"""The router's product from bfloat16 parts against float64: as near as the product in float32 is."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.operation import Target
from deepseek_v3.ops.router_gemm import ROUTER_GEMM, RouterLogits, reference_router_logits
from helpers.experts import fill_new_memory_with_nan

SHAPES = [(1, 8, 1), (40, 520, 16), (1100, 136, 9), (300, 2048, 64), (140, 72, 130)]


@pytest.fixture
def router_logits(triton_device: torch.device) -> Iterator[RouterLogits]:
    """The kernel, on tensors of `triton_device`; what it leaves unwritten is NaN."""
    from deepseek_v3.ops.router_gemm import triton

    with fill_new_memory_with_nan():
        yield triton.router_logits


def rows_weight_upstream(
    tokens: int, width: int, experts: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and gradients over six powers of ten."""
    x_TD = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    scale_E = 10 ** torch.linspace(-5, 1, experts, device=device)
    weight_ED = (torch.randn(experts, width, device=device) * scale_E[:, None]).requires_grad_()
    return x_TD, weight_ED, torch.randn(tokens, experts, device=device) * scale_E.flip(0)


def run(logits: RouterLogits, x_TD: Tensor, weight_ED: Tensor, upstream_TE: Tensor) -> list[Tensor]:
    """The logits, and the gradients of the rows and of the weight."""
    logits_TE = logits(x_TD, weight_ED)
    return [logits_TE, *torch.autograd.grad(logits_TE, (x_TD, weight_ED), upstream_TE)]


def exact(x_TD: Tensor, weight_ED: Tensor, upstream_TE: Tensor) -> list[Tensor]:
    wide = [x.detach().double().requires_grad_() for x in (x_TD, weight_ED)]
    return run(reference_router_logits, *wide, upstream_TE.double())


@pytest.mark.parametrize(("tokens", "width", "experts"), SHAPES)
def test_parts_are_as_exact_as_float32(
    router_logits: RouterLogits, triton_device: torch.device, tokens: int, width: int, experts: int
) -> None:
    """Errors of every expert by themselves, because the weights of experts differ in size."""
    tensors = rows_weight_upstream(tokens, width, experts, triton_device)
    logits_TE, grad_x_TD, grad_weight_ED = run(router_logits, *tensors)
    by_float32, expected = run(reference_router_logits, *tensors), exact(*tensors)
    assert [x.dtype for x in (logits_TE, grad_x_TD, grad_weight_ED)] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]

    for found, other, right, axis in (
        (logits_TE, by_float32[0], expected[0], 0),
        (grad_weight_ED, by_float32[2], expected[2], 1),
    ):
        allowed = 4 * (other - right).abs().amax(axis) + 2e-6 * right.abs().amax(axis)
        assert ((found - right).abs().amax(axis) <= allowed).all()
    # Rounded once to bfloat16: half a unit in the last place, and 2^-16 of the largest terms that cancel.
    terms_TD = tensors[2].abs().double() @ tensors[1].abs().double()
    assert ((grad_x_TD - expected[1]).abs() <= 2**-8 * expected[1].abs() + 2**-15 * terms_TD).all()


def test_sums_of_one_sign_lose_nothing(router_logits: RouterLogits, triton_device: torch.device) -> None:
    """Tensor cores cut bits off a sum, always towards zero: the longer the sum, the more.

    Short sums lose less than 2 · 2^-24 of these here, and one sum of all products loses 14 · 2^-24.
    """
    length, bound = 4096, 5 * 2**-24
    x_TD = torch.ones(2, length, dtype=torch.bfloat16, device=triton_device)
    weight_ED = torch.rand(3, length, device=triton_device)
    expected = weight_ED.double().sum(1)
    assert (router_logits(x_TD, weight_ED) / expected - 1).abs().max() <= bound

    upstream_TE = torch.rand(length, 3, device=triton_device)
    x_TD, weight_ED = x_TD.T.contiguous(), torch.zeros(3, 2, device=triton_device, requires_grad=True)
    (grad_ED,) = torch.autograd.grad(router_logits(x_TD, weight_ED), weight_ED, upstream_TE)
    assert (grad_ED.T / upstream_TE.double().sum(0) - 1).abs().max() <= bound


def test_a_part_of_every_number_counts(router_logits: RouterLogits, triton_device: torch.device) -> None:
    """1 + 2^-9 + 2^-18 has a bit in each of its three parts."""
    weight_ED = torch.full((1, 1), 1 + 2**-9 + 2**-18, device=triton_device)
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, device=triton_device)
    assert router_logits(x_TD, weight_ED).item() == weight_ED.item()


def test_a_compiled_graph_keeps_the_parts(router_logits: RouterLogits, triton_device: torch.device) -> None:
    """A compiler that sees the rounding may leave it out, and with it two of the three parts."""
    tensors = rows_weight_upstream(6, 64, 8, triton_device)
    compiled = torch.compile(
        lambda x, weight: router_logits(x, weight),
        fullgraph=True,
        backend="inductor" if triton_device.type == "cuda" else "aot_eager",
    )
    for found, expected in zip(run(compiled, *tensors), run(router_logits, *tensors), strict=True):
        assert torch.equal(found, expected)


def test_no_tokens_make_no_logits(router_logits: RouterLogits, triton_device: torch.device) -> None:
    tensors = rows_weight_upstream(0, 16, 4, triton_device)
    logits_TE, grad_x_TD, grad_weight_ED = run(router_logits, *tensors)
    assert logits_TE.shape == (0, 4)
    assert grad_x_TD.shape == (0, 16)
    assert grad_weight_ED.eq(0).all()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target(torch.device("cuda"), torch.bfloat16), "router_gemm triton"),
        (Target(torch.device("cuda"), torch.float32), "router_gemm reference (triton needs bfloat16)"),
        (Target(torch.device("cpu"), torch.bfloat16), "router_gemm reference (triton needs a CUDA device)"),
    ],
)
def test_parts_are_for_bfloat16_on_a_gpu(target: Target, expected: str) -> None:
    assert str(ROUTER_GEMM.select(target)) == expected

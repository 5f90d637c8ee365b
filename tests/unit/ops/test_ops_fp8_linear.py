"""The FP8 linear layer against float64 on its dequantized operands, and against the exact product."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from deepseek_v3.ops.fp8 import reference
from deepseek_v3.ops.fp8.linear import Fp8Recipe, fp8_linear
from deepseek_v3.ops.fp8_gemm import reference as products
from deepseek_v3.ops.layers import Linear
from helpers.models import fill_with_noise

EXACT = 1e-12
# For a product of two rounded operands. A number is rounded by at most 1/16 of it, about 2.6% on average.
ROUNDED = 0.05


def recipe(power_of_two: bool = False, keeps_weights: bool = True) -> Fp8Recipe:
    return Fp8Recipe(reference, products, power_of_two, keeps_weights)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())


def rows(x_TD: Tensor, power_of_two: bool = False) -> Tensor:
    """The numbers of rows after their way through FP8, float64."""
    return reference.dequantize_1x128(*reference.quantize_1x128(x_TD, power_of_two), torch.float64)


def columns(x_TD: Tensor, power_of_two: bool = False) -> Tensor:
    return rows(x_TD.T, power_of_two).T


def weight(w_OI: Tensor, power_of_two: bool = False) -> Tensor:
    return reference.dequantize_128x128(*reference.quantize_128x128(w_OI, power_of_two), torch.float64)


@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(3, 50, 144, 272), (1, 128, 128, 128), (1, 1, 16, 32)])
def test_output_and_gradients_are_products_of_fp8(
    shape: tuple[int, int, int, int], power_of_two: bool, keeps_weights: bool
) -> None:
    batch, length, inside, outside = shape
    x_BSI = torch.randn(batch, length, inside, dtype=torch.float64, requires_grad=True)
    w_OI = torch.randn(outside, inside, dtype=torch.float64, requires_grad=True)
    upstream_BSO = torch.randn(batch, length, outside, dtype=torch.float64)

    y_BSO = fp8_linear(x_BSI, w_OI, recipe(power_of_two, keeps_weights))
    grad_x_BSI, grad_OI = torch.autograd.grad(y_BSO, (x_BSI, w_OI), upstream_BSO)

    x_TI, grad_TO = x_BSI.detach().flatten(0, 1), upstream_BSO.flatten(0, 1)
    quantized_OI = weight(w_OI.detach(), power_of_two)
    found = (y_BSO.flatten(0, 1), grad_x_BSI.flatten(0, 1), grad_OI)
    expected = (
        rows(x_TI, power_of_two) @ quantized_OI.T,
        rows(grad_TO, power_of_two) @ quantized_OI,
        columns(grad_TO, power_of_two).T @ columns(x_TI, power_of_two),
    )
    exact = (x_TI @ w_OI.detach().T, grad_TO @ w_OI.detach(), grad_TO.T @ x_TI)
    for one, by_hand, unrounded in zip(found, expected, exact, strict=True):
        assert relative_error(one, by_hand) < EXACT
        assert relative_error(one, unrounded) < ROUNDED


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_types_of_their_tensors(weight_dtype: torch.dtype) -> None:
    """Float32 for master weights; bfloat16 for weights that FSDP gathers in it."""
    x_TI = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    w_OI = torch.randn(32, 64, dtype=weight_dtype, requires_grad=True)
    y_TO = fp8_linear(x_TI, w_OI, recipe())
    y_TO.sum().backward()
    assert y_TO.dtype == torch.bfloat16
    assert x_TI.grad is not None
    assert w_OI.grad is not None
    assert (x_TI.grad.dtype, w_OI.grad.dtype) == (torch.bfloat16, weight_dtype)


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed_are_computed(needs_x: bool, needs_weight: bool) -> None:
    x_TI, w_OI = torch.randn(20, 64), torch.randn(32, 64)
    both = [tensor.clone().requires_grad_() for tensor in (x_TI, w_OI)]
    expected_TO = fp8_linear(both[0], both[1], recipe())
    expected = torch.autograd.grad(expected_TO.square().sum(), both)

    some = [x_TI.requires_grad_(needs_x), w_OI.requires_grad_(needs_weight)]
    y_TO = fp8_linear(some[0], some[1], recipe())
    assert torch.equal(y_TO, expected_TO)
    assert y_TO.requires_grad == (needs_x or needs_weight)
    if y_TO.requires_grad:
        y_TO.square().sum().backward()
    for tensor, gradient in zip(some, expected, strict=True):
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, gradient)


def test_a_layer_keeps_one_byte_per_number() -> None:
    """The input in FP8 and the transposed weight, and their scales; nothing of 16 or 32 bits but these."""
    kept: list[Tensor] = []
    x_TI = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
    w_OI = torch.randn(384, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        fp8_linear(x_TI, w_OI, recipe())
    assert sum(tensor.nbytes for tensor in kept) == 256 * 128 + 384 * 128 + 4 * (2 * 128 + 3)


def test_an_input_that_is_kept_anyway_gives_the_same() -> None:
    x_TI, w_OI = torch.randn(150, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    kept: list[Tensor] = []
    results = []
    for keeps_input in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            y_TO = fp8_linear(x_TI, w_OI, recipe(), keeps_input=keeps_input)
        results.append([y_TO, *torch.autograd.grad(y_TO.square().sum(), (x_TI, w_OI))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert [tensor.data_ptr() == x_TI.data_ptr() for tensor in kept[4:]] == [True, False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same process cannot both interpret and compile")
@pytest.mark.parametrize("keeps_weights", [True, False])
def test_compiled_layers_quantize_what_they_share_once(keeps_weights: bool) -> None:
    """The compiler merges equal calls: two layers read one input, and their outputs have one gradient.

    It must not merge the two quantizations of a weight that is not kept.
    """
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    from deepseek_v3.ops.fp8 import triton as kernels
    from deepseek_v3.ops.fp8_gemm import triton as kernel_products

    torch._dynamo.reset()
    calls: list[Counter[str]] = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.append(Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if "fp8" in node.name))
        return make_boxed_func(graph.forward)

    in_triton = Fp8Recipe(kernels, kernel_products, keeps_weights=keeps_weights)
    x_TI = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    layers = nn.ModuleList([Linear(16, 16), Linear(16, 16)])
    fill_with_noise(layers)
    for layer in layers:
        layer.product = partial(fp8_linear, recipe=in_triton)

    def two_layers() -> Tensor:
        return layers[0](x_TI) + layers[1](x_TI)

    backend = aot_autograd(
        fw_compiler=counting, bw_compiler=counting, partition_fn=min_cut_rematerialization_partition
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        y_TO = torch.compile(two_layers, backend=backend, fullgraph=True)()
    inputs = [x_TI, *layers.parameters()]
    found, expected = (torch.autograd.grad(each.sum(), inputs) for each in (y_TO, two_layers()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    forward, backward = calls
    assert (forward["fp8_quantize_both"], backward["fp8_quantize_both"]) == (1, 1)
    assert (forward["fp8_quantize_weight"], backward["fp8_quantize_weight"]) == (2, 0 if keeps_weights else 2)
    assert len([tensor for tensor in kept if tensor.shape == (1, 16, 16)]) == (2 if keeps_weights else 0)


def test_no_rows_have_no_influence() -> None:
    x_TI = torch.empty(0, 64, requires_grad=True)
    w_OI = torch.randn(32, 64, requires_grad=True)
    y_TO = fp8_linear(x_TI, w_OI, recipe())
    y_TO.sum().backward()
    assert y_TO.shape == (0, 32)
    assert x_TI.grad is not None
    assert x_TI.grad.shape == (0, 64)
    assert w_OI.grad is not None
    assert not w_OI.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_reaches_its_row_and_the_gradient(bad: float) -> None:
    """So the step is skipped, as it is in bfloat16."""
    x_TI = torch.randn(4, 64)
    x_TI[1, 3] = bad
    w_OI = torch.randn(32, 64, requires_grad=True)
    y_TO = fp8_linear(x_TI, w_OI, recipe())
    assert y_TO[1].isnan().all()
    assert F.linear(x_TI, w_OI)[0].isfinite().all()
    assert y_TO[[0, 2, 3]].isfinite().all()
    y_TO.sum().backward()
    assert w_OI.grad is not None
    assert w_OI.grad.isnan().any()

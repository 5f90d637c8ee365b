"""The order of a backward graph: large weight gradients behind everything else, with what only they need."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import deepseek_v3.ops.fp8_gemm.cuda  # noqa: F401 - registers the product
from deepseek_v3.training.parallel.weight_gradients_last import WEIGHT_GRADIENTS_LAST

PLACES = 256


def _product(a: Tensor, b: Tensor) -> Tensor:
    scales = [tensor.new_ones(PLACES // 128, len(tensor), dtype=torch.float32) for tensor in (a, b)]
    product = torch.ops.deepseek_v3.fp8_columns_product_cuda
    return product(a, scales[0], b, scales[1], None, PLACES, torch.float32)


def _graph(step: Callable[..., object], widths: tuple[int, int]) -> fx.GraphModule:
    a, b = (torch.empty(width, PLACES, dtype=torch.float8_e4m3fn) for width in widths)
    module = make_fx(step, tracing_mode="fake")(a, b, torch.empty(8, 8))
    WEIGHT_GRADIENTS_LAST(module.graph)
    module.graph.lint()
    return module


def _names(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def _step(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    gradient = _product(a.view(torch.uint8).clone().view(torch.float8_e4m3fn), b)[0]
    return x.exp().sin(), gradient


def test_a_large_gradient_comes_last_with_what_it_needs() -> None:
    names = _names(_graph(_step, (512, 512)))
    assert names.index("aten.sin.default") < names.index("aten.clone.default")
    assert names[-2:] == ["deepseek_v3.fp8_columns_product_cuda.default", "aten.select.int"]


def test_a_gradient_smaller_than_its_factors_stays() -> None:
    names = _names(_graph(_step, (16, 16)))
    assert names.index("deepseek_v3.fp8_columns_product_cuda.default") < names.index("aten.exp.default")


def test_what_others_read_too_stays_in_its_place() -> None:
    def shared(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        bits = a.view(torch.uint8).clone()
        gradient = _product(bits.view(torch.float8_e4m3fn), b)
        return bits.sum() + x.exp(), gradient.neg(), gradient

    names = _names(_graph(shared, (512, 512)))
    assert names.index("aten.clone.default") < names.index("aten.sum.default") < names.index("aten.exp.default")
    assert names[-2:] == ["deepseek_v3.fp8_columns_product_cuda.default", "aten.neg.default"]


def test_graphs_without_such_products_keep_their_order() -> None:
    module = _graph(lambda *tensors: tensors[2].exp().sin(), (16, 16))
    assert _names(module) == ["aten.exp.default", "aten.sin.default"]

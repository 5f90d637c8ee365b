"""The product of the router on the tensor cores of a GPU, as exact as in float32.

A float32 number is the sum of three bfloat16 numbers, of 8 bits each. Rows of tokens are bfloat16 already, so three
products with the parts of the weight, summed in float32, are the product with the weight itself. The gradient of
the weight needs the three parts of the logits' gradient in the same way. The gradient of the rows is rounded to
bfloat16, so 16 bits of both factors are enough for it.

Every step is inside an operator that torch.compile does not look into, because in a compiled kernel a number keeps
all of its bits where it is rounded to bfloat16 and widened again.

Axes: T tokens, D model width, E experts, P = 3·E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.dtypes import product_in_float32


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The reference's `router_logits` for bfloat16 rows and a float32 weight; differentiable once."""
    return _SplitProduct.apply(x_TD, weight_ED)


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _product(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(*ctx.saved_tensors, grad_TE)


@torch.library.custom_op("deepseek_v3::router_logits", mutates_args=())
def _product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    parts_TP = product_in_float32(x_TD, torch.cat(_parts(weight_ED)).T)
    return parts_TP.unflatten(1, (3, -1)).sum(1)


@torch.library.custom_op("deepseek_v3::router_logits_backward", mutates_args=())
def _gradients(x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weight."""
    first_TE, second_TE, third_TE = _parts(grad_TE)
    first_ED, second_ED, _ = _parts(weight_ED)
    grad_TP = torch.cat((first_TE, second_TE, third_TE), dim=1)
    grad_weight_PD = product_in_float32(grad_TP.T, x_TD)
    # The products first · first, second · first and first · second; those left out are below 2^-16 of the first.
    grad_TP[:, -weight_ED.shape[0] :] = first_TE
    grad_x_TD = grad_TP @ torch.cat((first_ED, first_ED, second_ED))
    return grad_x_TD, grad_weight_PD.unflatten(0, (3, -1)).sum(0)


@_product.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return weight_ED.new_empty(x_TD.shape[0], weight_ED.shape[0])


@_gradients.register_fake
def _(x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _parts(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is `wide`."""
    first = wide.bfloat16()
    rest = wide - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()

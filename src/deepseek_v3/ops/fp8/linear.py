"""A linear layer whose forward pass and both gradients are products of 8-bit blocks (DeepSeek-V3 report, §3.3).

Axes: T rows, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.fp8 import ColumnBlocks, Fp8Quantize, WeightBlocks
from deepseek_v3.ops.fp8_gemm import Fp8Gemm


@dataclass(frozen=True)
class Fp8Recipe:
    """What a model computes with in FP8: the back ends, and whether scales are powers of two.

    `keeps_weights`: the backward pass reads the FP8 weights of the forward pass. Otherwise it quantizes the weights
    again, so that no copy of them stays in memory in between, as suits weights that are gathered for each pass.
    """

    quantize: Fp8Quantize
    gemm: Fp8Gemm
    power_of_two: bool = False
    keeps_weights: bool = True

    def quantize_weight(self, weight_EOI: Tensor) -> tuple[WeightBlocks, WeightBlocks]:
        """The weights in FP8, and their transposes."""
        return self.quantize.quantize_weight(weight_EOI, self.power_of_two)

    def transposed_again(self, weight_EOI: Tensor) -> WeightBlocks:
        """The transposed weights, quantized again in a backward pass.

        The view has the same numbers. Without it, torch.compile would find the quantization of the forward pass to
        be equal, and keep its result.
        """
        weight_NI = weight_EOI.flatten(0, 1)
        return self.quantize_weight(weight_NI.unflatten(0, weight_EOI.shape[:2]))[1]


def fp8_linear(x: Tensor, weight_OI: Tensor, recipe: Fp8Recipe, keeps_input: bool = False) -> Tensor:
    """x · weightᵀ in FP8; (..., I) to (..., O), in the type of `x`.

    Rows of `x` and of the output's gradient are quantized in blocks of 1×128 along the axis that the product sums
    over, weights in blocks of 128×128. For the backward pass the layer keeps `x` and the weight in FP8; with
    `keeps_input` it keeps `x` itself, which takes no memory if another operation keeps it anyway. The weight has
    any float type, and its gradient has the same.
    """
    x_TI = x.flatten(0, -2)
    y_TO = _Fp8Linear.apply(x_TI, weight_OI, recipe, keeps_input)
    return y_TO.view(*x.shape[:-1], len(weight_OI))


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, recipe: Fp8Recipe, keeps_input: bool) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        quantize, power_of_two = recipe.quantize, recipe.power_of_two
        weight, transposed = recipe.quantize_weight(weight_OI[None])
        kept: list[Tensor] = []
        if needs_weight and not keeps_input:
            rows, columns = quantize.quantize_both(x_TI, power_of_two)
            kept += [*columns]
        else:
            rows = quantize.quantize_rows(x_TI, power_of_two)
            kept += [x_TI] if needs_weight else []
        if needs_x:
            kept += [*transposed] if recipe.keeps_weights else [weight_OI]
        ctx.save_for_backward(*kept)
        ctx.recipe, ctx.keeps_input, ctx.weight_dtype = recipe, keeps_input, weight_OI.dtype
        return recipe.gemm.rows_product(rows, weight, None, x_TI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        recipe, kept = ctx.recipe, ctx.saved_tensors
        quantize, power_of_two = recipe.quantize, recipe.power_of_two
        grad_x_TI = grad_OI = None
        if needs_weight and needs_x:
            rows, columns = quantize.quantize_both(grad_TO, power_of_two)
        elif needs_weight:
            columns = quantize.quantize_columns(grad_TO, power_of_two)
        else:
            rows = quantize.quantize_rows(grad_TO, power_of_two)
        if needs_weight:
            if ctx.keeps_input:
                x_columns, kept = quantize.quantize_columns(kept[0], power_of_two), kept[1:]
            else:
                x_columns, kept = ColumnBlocks(*kept[:2]), kept[2:]
            grad_EOI = recipe.gemm.columns_product(columns, x_columns, None, len(grad_TO), ctx.weight_dtype)
            grad_OI = grad_EOI[0]
        if needs_x:
            transposed = WeightBlocks(*kept) if recipe.keeps_weights else recipe.transposed_again(kept[0][None])
            grad_x_TI = recipe.gemm.rows_product(rows, transposed, None, grad_TO.dtype)
        return grad_x_TI, grad_OI, None, None

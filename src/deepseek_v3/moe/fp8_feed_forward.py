"""The SwiGLU network of a dense layer or of the shared experts in FP8 (DeepSeek-V3 report, §3.3).

The network is two autograd nodes, because a layer with an exchange computes something else between them. Between
the nodes all numbers are in FP8, in both directions: the first node also returns four empty stand-ins whose
gradients, by rows and by columns, are the FP8 gradient of the SwiGLU's input.

Axes: T rows, D model width, F hidden width, G = 2·F, P places of rows along a column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.moe.experts import FeedForward
from deepseek_v3.ops.fp8 import BLOCK, E4M3, ColumnBlocks, RowBlocks, WeightBlocks, padded_places
from deepseek_v3.ops.fp8.linear import Fp8Recipe


class Fp8Hidden(NamedTuple):
    """The hidden layer between the two halves of the network.

    `hidden` (T, F) and `kept` (T, 2F), the input of the SwiGLU, are in FP8 and have no gradient. The `stand_ins`
    have the shapes and types of `RowBlocks` and `ColumnBlocks` of the gradient of the SwiGLU's input.
    """

    hidden: RowBlocks
    kept: RowBlocks
    stand_ins: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype


def fp8_hidden(network: FeedForward, x: Tensor, recipe: Fp8Recipe) -> Fp8Hidden:
    """All of the network but the last projection: (..., D) to the hidden layer in FP8.

    The hidden width must be a multiple of 128.
    """
    gate, up = network.gate_proj.weight, network.up_proj.weight
    x_TD = x.flatten(0, -2)
    outputs = _Hidden.apply(x_TD, gate, up, recipe)
    return Fp8Hidden(RowBlocks(*outputs[:2]), RowBlocks(*outputs[2:4]), outputs[4:], x.shape, x.dtype)


def fp8_output(network: FeedForward, between: Fp8Hidden, recipe: Fp8Recipe) -> Tensor:
    """The last projection: (..., D), in the type of the network's input."""
    y_TD = _Output.apply(
        *between.stand_ins, *between.hidden, *between.kept, network.down_proj.weight, recipe, between.dtype
    )
    return y_TD.view(between.shape)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, ...]:
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        quantize, power_of_two = recipe.quantize, recipe.power_of_two
        weight, transposed = _stack(recipe, gate_FD, up_FD)
        kept_for_backward: list[Tensor] = []
        if any(needs_weights):
            rows, columns = quantize.quantize_both(x_TD, power_of_two)
            kept_for_backward += [*columns]
        else:
            rows = quantize.quantize_rows(x_TD, power_of_two)
        if needs_x:
            kept_for_backward += [*transposed] if recipe.keeps_weights else [gate_FD, up_FD]
        ctx.save_for_backward(*kept_for_backward)
        ctx.recipe, ctx.dtype, ctx.weight_dtype = recipe, x_TD.dtype, gate_FD.dtype

        gate_up_TG = recipe.gemm.rows_product(rows, weight, None, x_TD.dtype)
        hidden, kept = quantize.swiglu(gate_up_TG, None, power_of_two)
        ctx.mark_non_differentiable(*hidden, *kept)
        if not torch.compiler.is_compiling():  # else autograd makes gradients of zeros for them, which nobody reads
            ctx.set_materialize_grads(False)
        return *hidden, *kept, *_stand_ins(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        recipe, saved = ctx.recipe, ctx.saved_tensors
        rows, columns = RowBlocks(*gradients[4:6]), ColumnBlocks(*gradients[6:8])
        grad_x_TD = grad_gate_FD = grad_up_FD = None
        if any(needs_weights):
            x_columns, num_rows = ColumnBlocks(*saved[:2]), len(rows.values_XD)
            grad_EGD = recipe.gemm.columns_product(columns, x_columns, None, num_rows, ctx.weight_dtype)
            grad_gate_FD, grad_up_FD = grad_EGD[0].chunk(2)
            saved = saved[2:]
        if needs_x:
            transposed = WeightBlocks(*saved) if recipe.keeps_weights else _transposed_again(recipe, *saved)
            grad_x_TD = recipe.gemm.rows_product(rows, transposed, None, ctx.dtype)
        return grad_x_TD, grad_gate_FD, grad_up_FD, None


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *blocks, down_DF, recipe, dtype = inputs
        hidden, kept = RowBlocks(*blocks[4:6]), RowBlocks(*blocks[6:8])
        weight, transposed = recipe.quantize_weight(down_DF[None])
        ctx.save_for_backward(*kept, *(transposed if recipe.keeps_weights else (down_DF,)))
        ctx.recipe, ctx.weight_dtype = recipe, down_DF.dtype
        return recipe.gemm.rows_product(hidden, weight, None, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        recipe, saved = ctx.recipe, ctx.saved_tensors
        kept, weight = RowBlocks(*saved[:2]), saved[2:]
        transposed = WeightBlocks(*weight) if recipe.keeps_weights else recipe.transposed_again(weight[0][None])
        rows, columns = recipe.quantize.quantize_both(grad_TD, recipe.power_of_two)
        grad_hidden_TF = recipe.gemm.rows_product(rows, transposed, None, grad_TD.dtype)
        grad_rows, grad_columns, hidden_columns, _ = recipe.quantize.swiglu_backward(
            kept, grad_hidden_TF, None, None, recipe.power_of_two
        )
        grad_down_DF = None
        if ctx.needs_input_grad[8]:
            grad_EDF = recipe.gemm.columns_product(columns, hidden_columns, None, len(grad_TD), ctx.weight_dtype)
            grad_down_DF = grad_EDF[0]
        return *grad_rows, *grad_columns, None, None, None, None, grad_down_DF, None, None


def _stand_ins(kept: RowBlocks) -> tuple[Tensor, ...]:
    """Tensors of the shapes and types of a gradient of `kept`, by rows and by columns, without memory."""
    (rows, width), places = kept.values_XD.shape, padded_places(len(kept.values_XD), 1)
    value, scale = (kept.scales_XG.new_empty((), dtype=dtype) for dtype in (E4M3, torch.float32))
    return (
        value.expand(rows, width),
        scale.expand(kept.scales_XG.shape),
        value.expand(width, places),
        scale.expand(places // BLOCK, width),
    )


def _stack(recipe: Fp8Recipe, gate_FD: Tensor, up_FD: Tensor) -> tuple[WeightBlocks, WeightBlocks]:
    """Gate and up projection as one weight (1, 2F, D) in FP8, and its transpose."""
    (gate, gate_t), (up, up_t) = (recipe.quantize_weight(weight_FD[None]) for weight_FD in (gate_FD, up_FD))
    return _join(gate, up, dim=1), _join(gate_t, up_t, dim=2)


def _transposed_again(recipe: Fp8Recipe, gate_FD: Tensor, up_FD: Tensor) -> WeightBlocks:
    gate, up = (recipe.transposed_again(weight_FD[None]) for weight_FD in (gate_FD, up_FD))
    return _join(gate, up, dim=2)


def _join(one: WeightBlocks, other: WeightBlocks, dim: int) -> WeightBlocks:
    """Two weights side by side. Their blocks must be whole along that axis."""
    values = torch.cat([one.values_EOI.view(torch.uint8), other.values_EOI.view(torch.uint8)], dim)
    return WeightBlocks(values.view(E4M3), torch.cat([one.scales, other.scales], dim))

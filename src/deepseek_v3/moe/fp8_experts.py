"""The routed experts of a rank in FP8, from tokens to the sums over their experts (DeepSeek-V3 report, §3.3).

Rows in expert order never exist in bfloat16 before the first product: tokens are quantized once each, and their
8-bit rows are copied. The backward pass keeps the tokens, and the input of the SwiGLU in FP8; it computes the
SwiGLU again. Nothing on the way waits for the device.

Axes: R received tokens, X rows in expert order, M rows of one token at most, D model width, F expert width,
G = 2·F, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.moe.dispatch import Fp8Tokens
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.fp8 import RowBlocks, WeightBlocks
from deepseek_v3.ops.fp8.linear import Fp8Recipe
from deepseek_v3.ops.moe_permute import MoePermute, RowCopies


def run_fp8_experts(
    experts: RoutedExperts,
    x_RD: Tensor | Fp8Tokens,
    gates_X: Tensor,
    copies: RowCopies,
    ends_E: Tensor,
    recipe: Fp8Recipe,
) -> Tensor:
    """What `run_experts` computes, in FP8; (R, D) in the type of the tokens.

    Tokens that arrived in FP8 go into the products as they are.
    """
    stand_in_RD, received = x_RD if isinstance(x_RD, Fp8Tokens) else (x_RD, (None, None))
    weights = (experts.gate_up_proj, experts.down_proj)
    return _Fp8Experts.apply(stand_in_RD, *received, gates_X, *copies, ends_E, *weights, recipe, experts.permute)


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        received_RD: Tensor | None,
        received_scales: Tensor | None,
        gates_X: Tensor,
        source_X: Tensor,
        slots_RM: Tensor,
        ends_E: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        recipe: Fp8Recipe,
        permute: MoePermute,
    ) -> Tensor:
        quantize, gemm, power_of_two, dtype = recipe.quantize, recipe.gemm, recipe.power_of_two, x_RD.dtype
        kept_tokens: tuple[Tensor, ...] = (x_RD,)
        if received_RD is None or received_scales is None:
            tokens = quantize.quantize_rows(x_RD, power_of_two)
        else:
            tokens = kept_tokens = RowBlocks(received_RD, received_scales)
        gate_up, gate_up_t = recipe.quantize_weight(gate_up_EGD)
        down, down_t = recipe.quantize_weight(down_EDF)

        rows = quantize.gather_rows(tokens, source_X)
        gate_up_XG = gemm.rows_product(rows, gate_up, ends_E, dtype)
        hidden, kept = quantize.swiglu(gate_up_XG, gates_X, power_of_two)
        y_RD = permute.sum_rows(gemm.rows_product(hidden, down, ends_E, dtype), slots_RM)

        weights = (*gate_up_t, *down_t) if recipe.keeps_weights else (gate_up_EGD, down_EDF)
        ctx.save_for_backward(gates_X, source_X, slots_RM, ends_E, *kept, *weights, *kept_tokens)
        ctx.recipe, ctx.permute, ctx.dtype = recipe, permute, dtype
        ctx.weight_dtypes = (gate_up_EGD.dtype, down_EDF.dtype)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        recipe, (gates_X, source_X, slots_RM, ends_E, *saved) = ctx.recipe, ctx.saved_tensors
        quantize, gemm, power_of_two, dtype = recipe.quantize, recipe.gemm, recipe.power_of_two, ctx.dtype
        kept, num_rows = RowBlocks(*saved[:2]), len(source_X)
        if recipe.keeps_weights:
            gate_up_t, down_t, kept_tokens = WeightBlocks(*saved[2:4]), WeightBlocks(*saved[4:6]), saved[6:]
        else:
            gate_up_t, down_t = (recipe.transposed_again(weight) for weight in saved[2:4])
            kept_tokens = saved[4:]
        needs_x, needs_gate_up, needs_down = (ctx.needs_input_grad[index] for index in (0, 7, 8))

        rows = quantize.gather_rows(quantize.quantize_rows(grad_RD, power_of_two), source_X)
        grad_hidden_XF = gemm.rows_product(rows, down_t, ends_E, dtype)
        grad_rows, grad_columns, hidden_columns, grad_gates_X = quantize.swiglu_backward(
            kept, grad_hidden_XF, gates_X, ends_E, power_of_two
        )
        grad_x_RD = grad_gate_up_EGD = grad_down_EDF = None
        if needs_down:
            columns = quantize.gather_columns(grad_RD, source_X, ends_E, power_of_two)
            grad_down_EDF = gemm.columns_product(columns, hidden_columns, ends_E, num_rows, ctx.weight_dtypes[1])
        if needs_x:
            grad_x_RD = ctx.permute.sum_rows(gemm.rows_product(grad_rows, gate_up_t, ends_E, dtype), slots_RM)
        if needs_gate_up:
            if len(kept_tokens) == 1:
                columns = quantize.gather_columns(kept_tokens[0], source_X, ends_E, power_of_two)
            else:
                tokens = RowBlocks(*kept_tokens)
                columns = quantize.requantize_columns(tokens, source_X, ends_E, power_of_two, dtype)
            grad_gate_up_EGD = gemm.columns_product(grad_columns, columns, ends_E, num_rows, ctx.weight_dtypes[0])
        return grad_x_RD, None, None, grad_gates_X, None, None, None, grad_gate_up_EGD, grad_down_EDF, None, None

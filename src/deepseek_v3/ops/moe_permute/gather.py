"""Expert order and back with gathers in both directions.

Autograd's own backward of an index is a scattered addition: slow on GPUs, and its order of summation is not
fixed there. A permutation's backward is another gather, because its inverse is known.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.moe_permute.reference import ExpertOrder


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_X)
        ctx.num_tokens = x_TD.shape[0]
        return x_TD[order_X // (order_X.numel() // x_TD.shape[0])]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_X,) = ctx.saved_tensors
        return _sum_copies(grad_XD, inverse_X, ctx.num_tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, order_X: Tensor, inverse_X: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.copies = order_X.numel() // num_tokens
        return _sum_copies(rows_XD, inverse_X, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_X,) = ctx.saved_tensors
        return grad_TD[order_X // ctx.copies], None, None, None


def _sum_copies(rows_XD: Tensor, inverse_X: Tensor, num_tokens: int) -> Tensor:
    wide = torch.promote_types(rows_XD.dtype, torch.float32)
    return rows_XD[inverse_X].unflatten(0, (num_tokens, -1)).sum(1, dtype=wide).to(rows_XD.dtype)


def permute(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """The reference's `permute`, with a backward that gathers and sums in float32."""
    return _Permute.apply(x_TD, order.order_X, order.inverse_X)


def unpermute(rows_XD: Tensor, order: ExpertOrder, num_tokens: int) -> Tensor:
    """The reference's `unpermute`, summed in float32 and rounded once, with a backward that gathers."""
    return _Unpermute.apply(rows_XD, order.order_X, order.inverse_X, num_tokens)

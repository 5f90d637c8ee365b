"""Operations on the CPU whose result for a row does not depend on the other rows of a tensor.

Torch computes the last numbers of a tensor, which fill no vector register, by other code than the rest. Of sigmoid,
silu and rsqrt that code rounds differently, so the result for a row would depend on where the row lies. Sums,
products, quotients, square roots and `exp` give the same bits in both. Everything is computed in float32 (float64
for float64), as in the references of `ops`, and rounded once.

Axes: M rows, D width, H heads, P = R/2 pairs of R rotated numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.ops.layers import Linear, RMSNorm

_ONE = torch.ones(())  # adding a tensor is faster than adding a number of Python, which is converted each time


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ)."""
    return x.neg().exp_().add_(_ONE).reciprocal_()


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """silu(gate) · up, times an optional weight, in the type of `gate`."""
    wide = _widened(gate)
    product = (wide / wide.neg().exp_().add_(_ONE)).mul_(up)
    if weight is not None:
        product.mul_(weight)
    return _as(product, gate)


class RmsNorm:
    """The norm of a module: divides rows by their root mean square and multiplies them by a weight.

    It is computed as x / √(Σx² + D·ε) · (√D·weight), in fewer operations than its definition.
    """

    def __init__(self, module: RMSNorm) -> None:
        width = len(module.weight)
        self._weight_D = at_least_float32(module.weight) * math.sqrt(width)
        self._eps = torch.tensor(width * module.eps, dtype=self._weight_D.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of `x` (..., D), in the type of `x`."""
        wide = _widened(x)
        root = (wide * wide).sum(-1, keepdim=True).add_(self._eps).sqrt_()
        return _as((wide / root).mul_(self._weight_D), x)


def turns_of(cos_MP: Tensor, sin_MP: Tensor) -> Tensor:
    """What `rotate` needs of the tables of `rotary_tables`: cosines and signed sines, (M, 2, 1, R)."""
    cos_MR, sin_MR = (torch.stack(pair, dim=-1).flatten(1) for pair in ((cos_MP, cos_MP), (-sin_MP, sin_MP)))
    return torch.stack((cos_MR, sin_MR), dim=1).unsqueeze(2)


def rotate(x_MHR: Tensor, turns_M21R: Tensor) -> Tensor:
    """Rotates each pair (x[2p], x[2p+1]), in the type of `x_MHR`: x · cos, plus the swapped pair · (-sin, sin)."""
    wide_MHR, (cos_M1R, sin_M1R) = _widened(x_MHR), turns_M21R.unbind(1)
    rows, heads, width = x_MHR.shape
    swapped_MHR = wide_MHR.reshape(rows, heads, width // 2, 2).flip(-1).view(rows, heads, width)
    return _as((wide_MHR * cos_M1R).add_(swapped_MHR.mul_(sin_M1R)), x_MHR)


# Even a conversion that changes nothing takes as long as a small sum, so these two skip it.


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else at_least_float32(x)


def _as(result: Tensor, x: Tensor) -> Tensor:
    return result if result.dtype == x.dtype else result.to(x.dtype)


def transposed(module: Linear, dtype: torch.dtype) -> Tensor:
    """The weight of a layer, (in, out), in `dtype`, for `torch.mm`: the product that `linear` computes."""
    return module.weight.to(dtype).t()

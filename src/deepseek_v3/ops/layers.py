"""The two modules that every part of the model is made of.

A weight is converted to the type of the activations in the forward pass, so float32 master weights compute in
bfloat16 if the activations are bfloat16. `model/init.py` or a checkpoint sets the values of the weights.
"""

import torch
from torch import Tensor, nn

from deepseek_v3.ops.linear import LINEAR, LinearProduct, linear
from deepseek_v3.ops.operation import Select
from deepseek_v3.ops.rms_norm import RMS_NORM, RmsNorm, rms_norm


class Linear(nn.Module):
    """x · weightᵀ without bias; `weight` (out_features, in_features). `product` computes it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.product: LinearProduct = linear
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def select_backends(self, select: Select) -> None:
        self.product = select(LINEAR, *reversed(self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)

    def extra_repr(self) -> str:
        return " -> ".join(str(size) for size in reversed(self.weight.shape))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.rms_norm: RmsNorm = rms_norm

    def select_backends(self, select: Select) -> None:
        self.rms_norm = select(RMS_NORM, self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

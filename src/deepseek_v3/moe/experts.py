"""Feed-forward networks: the dense one, and the stack of routed experts.

Axes: R received tokens, X rows in expert order, D model width, F expert width, G = 2·F, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.dispatch import Fp8Tokens
from deepseek_v3.ops.grouped_gemm import GROUPED_GEMM, GroupedLinear, reference_grouped_linear
from deepseek_v3.ops.layers import Linear
from deepseek_v3.ops.moe_permute import MOE_PERMUTE, MoePermute, RowCopies, gather_rows, reference, sum_rows
from deepseek_v3.ops.operation import Select, copyable
from deepseek_v3.ops.swiglu import SWIGLU, PackedSwiGLU, packed_swiglu, swiglu


def run_hidden(network: FeedForward, x: Tensor) -> Tensor:
    """All of a network but the last projection, in the type of `x`: (..., D) to (..., F)."""
    return swiglu(network.gate_proj(x), network.up_proj(x))


def run_output(network: FeedForward, hidden: Tensor) -> Tensor:
    """The last projection of a network, in the type of `hidden`: (..., F) to (..., D)."""
    return network.down_proj(hidden)


class FeedForward(nn.Module):
    """The SwiGLU network of a dense layer or of the shared experts; (..., D) to (..., D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.run_hidden: Callable[[FeedForward, Tensor], Any] = run_hidden
        self.run_output: Callable[[FeedForward, Any], Tensor] = run_output
        self.gate_proj = Linear(width, hidden_width)
        self.up_proj = Linear(width, hidden_width)
        self.down_proj = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Any:
        """All of the network but the last projection, from (..., D); the argument of `output`."""
        return self.run_hidden(self, x)

    def output(self, hidden: Any) -> Tensor:
        """The last projection: (..., D)."""
        return self.run_output(self, hidden)


def run_experts(experts: RoutedExperts, x_RD: Tensor, gates_X: Tensor, copies: RowCopies, ends_E: Tensor) -> Tensor:
    """Runs the experts in the type of the tokens, as `RoutedExperts.forward` says.

    The gate is applied before the down projection, where rows are narrower and the product is part of the
    activation.
    """
    rows_XD = gather_rows(x_RD, copies, experts.permute)
    gate_up_XG = experts.grouped_linear(rows_XD, experts.gate_up_proj, ends_E)
    hidden_XF = experts.swiglu(gate_up_XG, gates_X)
    return sum_rows(experts.grouped_linear(hidden_XF, experts.down_proj, ends_E), copies, experts.permute)


class RoutedExperts(nn.Module):
    """The routed experts of a layer, stacked: one tensor per projection, and gate and up projection in one tensor.

    `num_experts` is the number of all experts of the layer. After `keep_shard` the tensors hold consecutive experts
    of them, from number `first_expert` on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.first_expert = experts, 0
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.run_experts: Callable[..., Tensor] = run_experts
        self.permute: MoePermute = copyable(reference)
        self.grouped_linear: GroupedLinear = reference_grouped_linear
        self.swiglu: PackedSwiGLU = packed_swiglu

    def select_backends(self, select: Select) -> None:
        width, hidden = self.down_proj.shape[1:]
        self.permute = copyable(select(MOE_PERMUTE, width))
        self.grouped_linear = select(GROUPED_GEMM, width, hidden)
        self.swiglu = select(SWIGLU, hidden)

    def keep_shard(self, index: int, num_shards: int) -> None:
        """Keeps shard `index`, from 0, of `num_shards` equal ones. `num_shards` must divide `num_experts`."""
        size = self.num_experts // num_shards
        self.first_expert = index * size
        for name, stack in list(self.named_parameters()):
            kept = stack.detach()[self.first_expert : self.first_expert + size].clone()
            setattr(self, name, nn.Parameter(kept))

    def forward(self, x_RD: Tensor | Fp8Tokens, gates_X: Tensor, copies: RowCopies, ends_E: Tensor) -> Tensor:
        """The sum over each token's experts, times their gates; (R, D), 0 for a token without an expert here.

        Row x is a copy of token `copies.source_X[x]` with the gate `gates_X[x]` float32; `ends_E` int32 says where
        each expert's rows end. A dispatcher gives tokens in FP8 only to experts that compute in FP8.
        """
        return self.run_experts(self, x_RD, gates_X, copies, ends_E)

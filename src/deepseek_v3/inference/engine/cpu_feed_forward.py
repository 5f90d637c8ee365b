"""The feed-forward networks of the engine on the CPU: only the chosen experts run, on padded numbers of rows.

Axes: M rows, N of them that are tokens, D model width, F expert width, G = 2·F, E experts, K experts per token, X
rows in expert order, with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from deepseek_v3.inference.engine.invariant_ops import sigmoid, swiglu, transposed
from deepseek_v3.inference.engine.row_counts import padded
from deepseek_v3.moe.experts import FeedForward
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.router_gemm import raised_logits


class CpuFeedForward:
    """A dense network, or the shared experts."""

    def __init__(self, module: FeedForward, dtype: torch.dtype) -> None:
        projections = module.gate_proj, module.up_proj, module.down_proj
        self.gate, self.up, self.down = (transposed(projection, dtype) for projection in projections)

    def __call__(self, x_MD: Tensor) -> Tensor:
        return torch.mm(swiglu(torch.mm(x_MD, self.gate), torch.mm(x_MD, self.up)), self.down)


class CpuExperts:
    """The routed and the shared experts of a layer."""

    def __init__(self, module: MixtureOfExperts, dtype: torch.dtype) -> None:
        self.router, self.weight_DE = module.gate, module.gate.weight.t()
        self.gate_up = module.experts.gate_up_proj.to(dtype).mT.unbind()
        self.down = module.experts.down_proj.to(dtype).mT.unbind()
        self.per_token = module.config.num_experts_per_tok
        self.shared: CpuFeedForward | None = None
        if module.config.n_shared_experts:
            self.shared = CpuFeedForward(module.shared_experts, dtype)

    def __call__(self, x_MD: Tensor, number: int, counts: Sequence[int]) -> Tensor:
        """The output for each of `number` tokens, and for padding that of the shared experts; (M, D)."""
        logits_ME = torch.mm(x_MD.to(self.weight_DE.dtype), self.weight_DE)
        scores_ME = sigmoid(raised_logits(logits_ME))
        gates_NK, experts_NK, _ = self.router.route(scores_ME[:number])
        y_MD = x_MD.new_zeros(x_MD.shape) if self.shared is None else self.shared(x_MD)
        run = self._of_one if number == 1 else self._routed
        y_MD[:number].add_(run(x_MD, gates_NK, experts_NK, counts))
        return y_MD

    def _of_one(self, x_MD: Tensor, gates_1K: Tensor, experts_1K: Tensor, _: Sequence[int]) -> Tensor:
        """The same as `_routed` for a single token, the first row, which needs no sorting; (1, D)."""
        experts = experts_1K[0].tolist()
        gate_XF, up_XF = torch.cat([torch.mm(x_MD, self.gate_up[expert]) for expert in experts]).chunk(2, dim=-1)
        rows = x_MD.shape[0]
        gates_X1 = gates_1K.view(-1, 1).expand(-1, rows).reshape(-1, 1)
        hidden_XF = swiglu(gate_XF, up_XF, gates_X1)
        pairs = zip(experts, hidden_XF.view(len(experts), rows, -1).unbind(), strict=True)
        y_K1D = [torch.mm(hidden_MF, self.down[expert])[:1].to(gates_1K.dtype) for expert, hidden_MF in pairs]
        return reduce(torch.add, y_K1D).to(x_MD.dtype)

    def _routed(self, x_MD: Tensor, gates_NK: Tensor, experts_NK: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum over each token's experts, added in the order of their scores; (N, D)."""
        choices_X, places, runs = _in_expert_order(experts_NK.flatten().tolist(), counts)
        order_X = torch.tensor(choices_X)
        x_XD = x_MD.index_select(0, order_X.div(self.per_token, rounding_mode="floor"))
        gate_up_XG = torch.cat([torch.mm(x_XD[a:b], self.gate_up[expert]) for expert, a, b in runs])
        gates_X1 = gates_NK.flatten().index_select(0, order_X).unsqueeze(1)
        gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
        hidden_XF = swiglu(gate_XF, up_XF, gates_X1)
        y_XD = torch.cat([torch.mm(hidden_XF[a:b], self.down[expert]) for expert, a, b in runs])
        y_NKD = (
            y_XD.index_select(0, torch.tensor(places)).view(-1, self.per_token, x_MD.shape[1]).to(gates_NK.dtype)
        )
        total_ND = y_NKD[:, 0]
        for slot in range(1, self.per_token):
            total_ND = total_ND + y_NKD[:, slot]
        return total_ND.to(x_MD.dtype)


def _in_expert_order(
    experts: list[int], counts: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """Sorts choices by expert, and pads the rows of each expert to one of `counts`.

    Returns the choice at each row, the row of each choice, and expert, first row and end of each run of rows.
    """
    choices_of: dict[int, list[int]] = {}
    for choice, expert in enumerate(experts):
        choices_of.setdefault(expert, []).append(choice)
    order: list[int] = []
    runs: list[tuple[int, int, int]] = []
    places = [0] * len(experts)
    for expert, choices in choices_of.items():
        first = len(order)
        for place, choice in enumerate(choices, start=first):
            places[choice] = place
        order += choices + choices[:1] * (padded(len(choices), counts) - len(choices))
        runs.append((expert, first, len(order)))
    return order, places, runs

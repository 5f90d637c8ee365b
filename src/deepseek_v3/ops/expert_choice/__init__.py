"""Choosing the experts of a few rows, such as those of a step of generation.

What a back end computes for a row does not depend on the number of rows, on the row's place, or on the other rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.expert_choice import reference
from deepseek_v3.ops.expert_choice.reference import Choices, ChosenRows
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = ["EXPERT_CHOICE", "Choices", "ChosenRows", "ExpertChoice", "reference"]


class ExpertChoice(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def router_logits(self, x_MD: Tensor, weight_ED: Tensor) -> Tensor: ...

    def choose(self, logits_ME: Tensor, bias_E: Tensor, choices: Choices) -> tuple[Tensor, Tensor]: ...

    def rows_by_expert(self, experts_MK: Tensor, slots_M: Tensor, num_experts: int) -> ChosenRows: ...


def _triton() -> ExpertChoice:
    from deepseek_v3.ops.expert_choice import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    (group,) = target.widths
    if group & (group - 1):
        return f"needs groups whose number of experts is a power of two, found {group}"
    return triton_obstacle(target)


# The width of its target is the number of experts of a group, of which 1 stands for any where groups do not matter.
EXPERT_CHOICE: Operation[ExpertChoice] = Operation(
    "expert_choice", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: reference)
)

"""The most probable token of each row of logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deepseek_v3.ops.greedy_choice.reference import greedy_choice
from deepseek_v3.ops.operation import Backend, Operation, triton_obstacle

GreedyChoice = Callable[[Tensor], Tensor]

__all__ = ["GREEDY_CHOICE", "GreedyChoice", "greedy_choice"]


def _triton() -> GreedyChoice:
    from deepseek_v3.ops.greedy_choice import triton

    return triton.greedy_choice


GREEDY_CHOICE: Operation[GreedyChoice] = Operation(
    "greedy_choice", Backend("triton", _triton, triton_obstacle), Backend("reference", lambda: greedy_choice)
)

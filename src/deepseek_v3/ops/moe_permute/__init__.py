"""Moving token rows into expert order and back."""

import torch

from deepseek_v3.ops.moe_permute import reference
from deepseek_v3.ops.moe_permute.permute import MoePermute, gather_rows, sum_rows
from deepseek_v3.ops.moe_permute.reference import BinOrder, ExpertBins, ExpertOrder, RowCopies, sort_by_expert
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = [
    "MOE_PERMUTE",
    "BinOrder",
    "ExpertBins",
    "ExpertOrder",
    "MoePermute",
    "RowCopies",
    "gather_rows",
    "reference",
    "sort_by_expert",
    "sum_rows",
]


def _triton() -> MoePermute:
    from deepseek_v3.ops.moe_permute import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    return triton_obstacle(target)


MOE_PERMUTE: Operation[MoePermute] = Operation(
    "moe_permute", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: reference)
)

"""The operations of a step of generation: on few rows, whose time is that of reading the weights.

What a back end computes for a row does not depend on the number of rows, on the row's place, or on the other rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.expert_choice import ChosenRows
from deepseek_v3.ops.few_rows import reference
from deepseek_v3.ops.operation import Backend, Operation, Target, triton_obstacle

__all__ = ["FEW_ROWS", "FewRows", "reference"]


class FewRows(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def product(self, x_MI: Tensor, w_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...

    def swiglu_product(self, x_MI: Tensor, w_GI: Tensor) -> Tensor: ...

    def product_by_head(self, x_MHI: Tensor, w_HOI: Tensor, out_MHO: Tensor) -> None: ...

    def rotate_heads(self, x_MHR: Tensor, cos_MP: Tensor, sin_MP: Tensor, out_MHR: Tensor) -> None: ...

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...

    def add_norm(self, x_MD: Tensor, added_MKD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def expert_swiglu_product(self, x_MD: Tensor, w_EGD: Tensor, rows: ChosenRows, gates_MK: Tensor) -> Tensor: ...

    def expert_product(self, hidden_MKF: Tensor, w_EDF: Tensor, rows: ChosenRows) -> Tensor: ...

    def greedy_choice(self, logits_BV: Tensor) -> Tensor: ...


def _triton() -> FewRows:
    from deepseek_v3.ops.few_rows import triton

    return triton


def _triton_obstacle(target: Target) -> str | None:
    if target.dtype not in (torch.float32, torch.bfloat16):
        return "needs float32 or bfloat16"
    return triton_obstacle(target)


# The width of its target is that of the model.
FEW_ROWS: Operation[FewRows] = Operation(
    "few_rows", Backend("triton", _triton, _triton_obstacle), Backend("reference", lambda: reference)
)

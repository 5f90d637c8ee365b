"""The matrix products of FP8 training: of a dense layer, or of routed experts, one weight per group of rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.fp8_gemm import reference
from deepseek_v3.ops.operation import Backend, Operation

__all__ = ["FP8_GEMM", "Fp8Gemm", "reference"]


class Fp8Gemm(Protocol):
    """The interface of a back end, as `reference.py` defines it."""

    def rows_product(
        self, a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor: ...

    def columns_product(
        self,
        a: ColumnBlocks,
        b: ColumnBlocks,
        ends_E: Tensor | None,
        num_rows: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor: ...


# The widths of its target are those of the rows, before and after every product.
FP8_GEMM: Operation[Fp8Gemm] = Operation("fp8_gemm", Backend("reference", lambda: reference))

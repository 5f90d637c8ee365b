"""DeepGEMM's FP8 products, where it can be imported: `deep_gemm`, or the copy that a vLLM wheel contains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_v3.benchmark.ops_cases.case import Run
from deepseek_v3.ops.fp8 import ColumnBlocks, RowBlocks, WeightBlocks
from deepseek_v3.ops.fp8.formats import BLOCK


def load_deep_gemm() -> Any:
    """The module, or a text that says why it cannot be used."""
    try:
        import deep_gemm
    except ImportError:
        try:
            from vllm.third_party import deep_gemm
        except ImportError as error:
            return f"not installed ({error})"
    return deep_gemm


def rows_run(a: RowBlocks, w: WeightBlocks, ends_E: Tensor | None) -> Run | str:
    """Forward and input-gradient products; one set of inputs, because theirs are large enough at every size."""
    found = load_deep_gemm()
    if isinstance(found, str):
        return found
    rows, width = len(a.values_XD), w.values_EOI.shape[1]
    out_XO = torch.empty(rows, width, dtype=torch.bfloat16, device=a.values_XD.device)
    if ends_E is None:
        weight = (w.values_EOI[0], w.scales[0])

        def dense(_: int) -> list[Tensor]:
            found.fp8_gemm_nt(tuple(a), weight, out_XO)
            return [out_XO]

        return dense
    places = torch.arange(rows, device=ends_E.device)
    expert_X = torch.searchsorted(ends_E, places, right=True, out_int32=True)

    def grouped(_: int) -> list[Tensor]:
        found.m_grouped_fp8_gemm_nt_contiguous(tuple(a), tuple(w), out_XO, expert_X)
        return [out_XO]

    return grouped


def columns_run(a: ColumnBlocks, b: ColumnBlocks, sizes: list[int]) -> Run | str:
    """Weight-gradient products of groups whose sizes are multiples of 128; on Hopper each group's matrix is whole.

    DeepGEMM adds to its result, so the first call begins with zeros and the next ones go on from there.
    """
    found = load_deep_gemm()
    if isinstance(found, str):
        return found
    (left, left_scales), (right, right_scales) = (_whole_groups(each, sizes) for each in (a, b))
    device = a.values_DP.device
    sizes_E = torch.tensor(sizes, dtype=torch.int32, device=device)
    shape = len(sizes), len(a.values_DP), len(b.values_DP)
    out_EOI = torch.zeros(shape, device=device)

    def run(call: int) -> list[Tensor]:
        if call == 0:
            out_EOI.zero_()
        found.k_grouped_fp8_gemm_nt_contiguous(
            (left, left_scales), (right, right_scales), out_EOI, sizes, sizes_E, out_EOI
        )
        return [out_EOI]

    return run


def _whole_groups(columns: ColumnBlocks, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The matrices (D, places) of all groups one after another, and scales (D, blocks)."""
    used = sum(sizes)
    groups = columns.values_DP[:, :used].split(sizes, dim=1)
    return torch.cat([group.flatten() for group in groups]), columns.scales_BD[: used // BLOCK].T

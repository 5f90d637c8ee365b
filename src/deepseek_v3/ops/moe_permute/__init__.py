"""Token rows into expert order and back."""

from deepseek_v3.ops.moe_permute.permute import (
    BinOrder,
    ExpertBins,
    RowCopies,
    gather_rows,
    permute,
    sort_into_bins,
    sum_rows,
    unpermute,
)
from deepseek_v3.ops.moe_permute.reference import ExpertOrder, sort_by_expert

__all__ = [
    "BinOrder",
    "ExpertBins",
    "ExpertOrder",
    "RowCopies",
    "gather_rows",
    "permute",
    "sort_by_expert",
    "sort_into_bins",
    "sum_rows",
    "unpermute",
]

"""Token rows into expert order and back."""

from deepseek_v3.ops.moe_permute.permute import (
    BinOrder,
    Bins,
    Copies,
    line_up,
    permute,
    spread,
    sum_copies,
    unpermute,
)
from deepseek_v3.ops.moe_permute.reference import ExpertOrder, sort_by_expert

__all__ = [
    "BinOrder",
    "Bins",
    "Copies",
    "ExpertOrder",
    "line_up",
    "permute",
    "sort_by_expert",
    "spread",
    "sum_copies",
    "unpermute",
]

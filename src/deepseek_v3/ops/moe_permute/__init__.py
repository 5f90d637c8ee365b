"""Token rows into expert order and back."""

from deepseek_v3.ops.moe_permute.bins import BinOrder, Bins, line_up
from deepseek_v3.ops.moe_permute.copies import Copies, spread, sum_copies
from deepseek_v3.ops.moe_permute.gather import permute, unpermute
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

"""Token rows into expert order and back."""

from deepseek_v3.ops.moe_permute.copies import Copies, copies_at, spread, sum_copies
from deepseek_v3.ops.moe_permute.gather import permute, unpermute
from deepseek_v3.ops.moe_permute.reference import ExpertOrder, sort_by_expert

__all__ = [
    "Copies",
    "ExpertOrder",
    "copies_at",
    "permute",
    "sort_by_expert",
    "spread",
    "sum_copies",
    "unpermute",
]

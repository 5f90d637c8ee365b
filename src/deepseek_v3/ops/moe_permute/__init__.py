"""Token rows into expert order and back."""

from deepseek_v3.ops.moe_permute.gather import permute, unpermute
from deepseek_v3.ops.moe_permute.reference import ExpertOrder, sort_by_expert

__all__ = ["ExpertOrder", "permute", "sort_by_expert", "unpermute"]

"""Causal attention with keys and values of different widths, in plain torch."""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def attention(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, scale: float, allowed_BSS: Tensor | None = None
) -> Tensor:
    """softmax(scale · q·kᵀ) · v over the keys that a query attends to; (B, S, H, V), in the type of `q`.

    A query attends to the keys up to its own position; `allowed_BSS` (batch, query, key) bool replaces this rule.
    Scores and softmax are computed in float32 (float64 for float64).
    Axes: B batch, S sequence, H heads, K width of queries and keys, V width of values.
    """
    scores_BHSS = torch.einsum("bqhk,bshk->bhqs", at_least_float32(q_BSHK), at_least_float32(k_BSHK)) * scale
    if allowed_BSS is None:
        allowed_BSS = torch.ones(scores_BHSS.shape[-2:], dtype=torch.bool, device=q_BSHK.device).tril()[None]
    weights_BHSS = scores_BHSS.masked_fill(~allowed_BSS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqs,bshv->bqhv", weights_BHSS, at_least_float32(v_BSHV)).to(q_BSHK.dtype)

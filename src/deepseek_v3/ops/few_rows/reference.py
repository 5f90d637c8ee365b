"""The operations of a step of generation, in plain torch.

Sums and everything between two results are computed in float32 (float64 for float64), and rounded once.

Axes: M rows, I inputs, O outputs, H heads, R rotary width, P = R/2 pairs, D model width, E experts, K experts per
token, F expert width, G = 2·F: the gate, and then up, B requests, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.ops.expert_choice import ChosenRows
from deepseek_v3.ops.rms_norm import rms_norm as reference_rms_norm
from deepseek_v3.ops.rotary.reference import rotate
from deepseek_v3.ops.swiglu.reference import packed_swiglu

rms_norm = reference_rms_norm


def product(x_MI: Tensor, w_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x · wᵀ, (M, O), in `dtype`, by default in the type of `x_MI`."""
    return F.linear(at_least_float32(x_MI), at_least_float32(w_OI)).to(dtype or x_MI.dtype)


def swiglu_product(x_MI: Tensor, w_GI: Tensor) -> Tensor:
    """silu(gate) · up of the two halves of x · wᵀ, which are not rounded; (M, F) in the type of `x_MI`."""
    gate_up_MG = F.linear(at_least_float32(x_MI), at_least_float32(w_GI))
    return packed_swiglu(gate_up_MG, gate_up_MG.new_ones(len(x_MI))).to(x_MI.dtype)


def product_by_head(x_MHI: Tensor, w_HOI: Tensor, out_MHO: Tensor) -> None:
    """Writes x · wᵀ of each head to `out_MHO`. Every tensor may be a part of a larger one, or transposed."""
    out_MHO.copy_(torch.einsum("mhi,hoi->mho", at_least_float32(x_MHI), at_least_float32(w_HOI)))


def rotate_heads(x_MHR: Tensor, cos_MP: Tensor, sin_MP: Tensor, out_MHR: Tensor) -> None:
    """Writes `x_MHR`, each head rotated as `ops.rotary` says by a row's angles, to `out_MHR`."""
    out_MHR.copy_(rotate(x_MHR[None], cos_MP[None], sin_MP[None])[0])


def add_norm(x_MD: Tensor, added_MKD: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x_MD` plus the sum over K of `added_MKD`, and the norm of this.

    Both sums are rounded to the type of `x_MD`.
    """
    total_MD = x_MD + at_least_float32(added_MKD).sum(1).to(x_MD.dtype)
    return total_MD, rms_norm(total_MD, norm_D, eps)


def expert_swiglu_product(x_MD: Tensor, w_EGD: Tensor, rows: ChosenRows, gates_MK: Tensor) -> Tensor:
    """`swiglu_product` of each row and each expert that it chooses, times the gate; (M, K, F).

    Rows that choose none, which are padding, are undefined here and in what follows from them.
    """
    (num_rows, per_token), width = gates_MK.shape, w_EGD.shape[1] // 2
    out_XF = x_MD.new_empty(num_rows * per_token, width)
    for expert, choices_X in _choices(rows):
        gate_up_XG = F.linear(at_least_float32(x_MD[choices_X // per_token]), at_least_float32(w_EGD[expert]))
        out_XF[choices_X] = packed_swiglu(gate_up_XG, gates_MK.flatten()[choices_X]).to(out_XF.dtype)
    return out_XF.view(num_rows, per_token, width)


def expert_product(hidden_MKF: Tensor, w_EDF: Tensor, rows: ChosenRows) -> Tensor:
    """`product` of what `expert_swiglu_product` returns and each row's experts; (M, K, D)."""
    hidden_XF = hidden_MKF.flatten(0, 1)
    out_XD = hidden_XF.new_empty(len(hidden_XF), w_EDF.shape[1])
    for expert, choices_X in _choices(rows):
        out_XD[choices_X] = product(hidden_XF[choices_X], w_EDF[expert])
    return out_XD.view(*hidden_MKF.shape[:2], -1)


def _choices(rows: ChosenRows) -> list[tuple[int, Tensor]]:
    counts = rows.counts_E.tolist()
    return [(expert, rows.choices_EM[expert, :count].long()) for expert, count in enumerate(counts) if count]


def greedy_choice(logits_BV: Tensor) -> Tensor:
    """The lowest of the ids with the largest logit of each row, (B,) int64; -1 for a row that is not finite."""
    is_finite_B = (logits_BV - logits_BV).sum(-1) == 0  # the difference is NaN for NaN and infinity, and 0 else
    return logits_BV.argmax(-1).masked_fill(~is_finite_B, -1)

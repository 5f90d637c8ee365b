"""Choosing the experts of a few rows in Triton: a program computes a few logits, a row's experts, an expert's rows.

Axes: as in `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.early_launch.triton import early, wait
from deepseek_v3.ops.expert_choice.reference import Choices, ChosenRows

_ROWS, _COLUMNS, _LENGTH = 2, 2, 1024  # of a tile of logits
_CHOICES = 1024  # that a program reads at a time


def router_logits(x_MD: Tensor, weight_ED: Tensor) -> Tensor:
    """The reference's `router_logits` of a float32 weight, in float32 without tensor cores."""
    (rows, width), experts = x_MD.shape, len(weight_ED)
    out_ME = x_MD.new_empty(rows, experts, dtype=torch.float32)
    grid = triton.cdiv(experts, _COLUMNS), triton.cdiv(rows, _ROWS)
    _logits_kernel[grid](
        x_MD.contiguous(),
        weight_ED,
        out_ME,
        rows,
        experts,
        width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        LENGTH=_LENGTH,
        **early(x_MD.device),
    )
    return out_ME


def choose(logits_ME: Tensor, bias_E: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
    """The reference's `choose` for float32; the number of experts of a group is a power of two."""
    rows, experts = logits_ME.shape
    gates_MK = logits_ME.new_empty(rows, choices.per_token + choices.shared)
    experts_MK = torch.empty_like(gates_MK, dtype=torch.int32)
    limited = choices.kept_groups < choices.groups
    size = experts // choices.groups if limited else triton.next_power_of_2(experts)
    _choose_kernel[(rows,)](
        logits_ME,
        bias_E,
        gates_MK,
        experts_MK,
        experts,
        choices.scaling,
        PER_TOKEN=choices.per_token,
        SHARED=choices.shared,
        CHOICES=triton.next_power_of_2(choices.per_token + choices.shared),
        GROUPS=triton.next_power_of_2(choices.groups) if limited else 1,
        SIZE=size,
        KEPT=choices.kept_groups if limited else 0,
        NORMALISED=choices.normalised,
        num_warps=1,
        **early(logits_ME.device),
    )
    return gates_MK, experts_MK


def rows_by_expert(experts_MK: Tensor, slots_M: Tensor, num_experts: int) -> ChosenRows:
    """The reference's `rows_by_expert`; entries behind the valid ones are undefined."""
    rows, per_token = experts_MK.shape
    choices_EM = experts_MK.new_empty(num_experts, rows)
    counts_E = experts_MK.new_empty(num_experts)
    block = min(_CHOICES, triton.next_power_of_2(rows * per_token))
    _sort_kernel[(num_experts,)](
        experts_MK,
        slots_M,
        choices_EM,
        counts_E,
        rows,
        rows * per_token,
        PER_TOKEN=per_token,
        BLOCK=block,
        **early(slots_M.device),
    )
    return ChosenRows(choices_EM, counts_E)


# The kernels


@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    x,
    w,
    out,
    rows,
    columns,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS, LENGTH), tl.float32)
    for start in range(0, length, LENGTH):
        at = start + tl.arange(0, LENGTH)
        inside = (at < length)[None, :]
        x_mask, w_mask = (row < rows)[:, None] & inside, (column < columns)[:, None] & inside
        x_tile = tl.load(x + row[:, None] * length + at[None, :], mask=x_mask, other=0.0).to(tl.float32)
        w_tile = tl.load(w + column[:, None] * length + at[None, :], mask=w_mask, other=0.0)
        sums += x_tile[:, None, :] * w_tile[None, :, :]
    out_at = out + row[:, None] * columns + column[None, :]
    tl.store(out_at, tl.sum(sums, 2), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _ordered(score):
    """Whole numbers in the order of float32 numbers; NaN is the largest."""
    score = tl.where(score == 0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _choose_kernel(
    logits,
    bias,
    gates_out,
    experts_out,
    experts,
    scaling,
    PER_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISED: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    group, expert = tl.arange(0, GROUPS)[:, None], tl.arange(0, GROUPS * SIZE).reshape(GROUPS, SIZE)
    inside = expert < experts
    logit = tl.load(logits + row * experts + expert, mask=inside, other=float("-inf"))
    highest = tl.max(tl.max(logit, 1), 0)
    logit = tl.where(highest < -64.0, logit - highest - 64.0, logit)
    score = 1.0 / (1.0 + tl.exp(-logit))
    biased = score + tl.load(bias + expert, mask=inside, other=0.0)
    taken = -0x7FFFFFFFFFFFFFFF
    # Below the bits of the score is the expert, the lowest as the largest.
    key = tl.where(inside, (_ordered(biased) << 32) + (GROUPS * SIZE - 1 - expert), taken)
    if KEPT > 0:
        first = tl.max(key, 1)[:, None]
        second = tl.max(tl.where(key == first, taken, key), 1)[:, None]
        value = tl.sum(tl.where((key == first) | (key == second), biased, 0.0), 1)[:, None]
        has_experts = tl.max(inside.to(tl.int32), 1)[:, None] > 0
        group_key = tl.where(has_experts, (_ordered(value) << 32) + (GROUPS - 1 - group), taken)
        kept = group < 0
        for _ in range(KEPT):
            largest = tl.max(tl.max(tl.where(kept, taken, group_key), 1), 0)
            kept = kept | (group_key == largest)
        key = tl.where(kept, key, taken)
    place = tl.arange(0, CHOICES)
    gates = tl.zeros((CHOICES,), tl.float32)
    chosen = experts + place - PER_TOKEN  # the shared ones
    for number in range(PER_TOKEN):
        largest = tl.max(tl.max(key, 1), 0)
        gate = tl.sum(tl.sum(tl.where(key == largest, score, 0.0), 1), 0)
        gates = tl.where(place == number, gate, gates)
        best = GROUPS * SIZE - 1 - (largest & 0xFFFFFFFF)
        chosen = tl.where(place == number, best.to(tl.int32), chosen)
        key = tl.where(key == largest, taken, key)
    if NORMALISED:
        gates = gates / (tl.sum(gates, 0) + 1e-20)
    gates = tl.where(place < PER_TOKEN, gates * scaling, 1.0)
    tl.store(gates_out + row * (PER_TOKEN + SHARED) + place, gates, mask=place < PER_TOKEN + SHARED)
    tl.store(experts_out + row * (PER_TOKEN + SHARED) + place, chosen, mask=place < PER_TOKEN + SHARED)


@triton.jit(do_not_specialize=["rows", "number"])
def _sort_kernel(
    experts,
    slots,
    choices_out,
    counts_out,
    rows,
    number,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    expert = tl.program_id(0)
    found = 0
    for first in range(0, number, BLOCK):
        choice = first + tl.arange(0, BLOCK)
        inside = choice < number
        chosen = tl.load(experts + choice, mask=inside, other=-1) == expert
        chosen = chosen & (tl.load(slots + choice // PER_TOKEN, mask=inside, other=-1) >= 0)
        place = found + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(choices_out + expert.to(tl.int64) * rows + place, choice, mask=chosen)
        found += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts_out + expert, found)

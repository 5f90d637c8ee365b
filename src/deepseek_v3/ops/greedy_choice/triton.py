"""The most probable token of each row of logits in Triton: many programs read a row, one takes the best of theirs.

A logit and its id are one whole number of 64 bits, in whose upper half the bits of the logit are ordered like it.

Axes: B rows, V vocabulary, P programs of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # logits of a program
_NOT_FINITE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


def greedy_choice(logits_BV: Tensor) -> Tensor:
    """The reference's `greedy_choice`, for float32, bfloat16 and float16 logits whose last axis is dense."""
    rows, vocabulary = logits_BV.shape
    programs = triton.cdiv(vocabulary, _BLOCK)
    best_BP = torch.empty(rows, programs, dtype=torch.int64, device=logits_BV.device)
    tokens_B = best_BP.new_empty(rows)
    if rows:
        _best_kernel[(rows, programs)](logits_BV, best_BP, vocabulary, logits_BV.stride(0), BLOCK=_BLOCK)
        _token_kernel[(rows,)](best_BP, tokens_B, programs, BLOCK=triton.next_power_of_2(programs))
    return tokens_B


@triton.jit
def _best_kernel(logits, best_out, vocabulary, logits_row, BLOCK: tl.constexpr):
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = program * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    logit = tl.load(logits + row * logits_row + token, mask=inside, other=0.0).to(tl.float32)
    difference = logit - logit  # 0 if it is finite
    logit = tl.where(logit == 0, 0.0, logit)  # -0 equals 0
    bits = logit.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) + (0x7FFFFFFF - token)
    key = tl.where(inside, key, -0x7FFFFFFFFFFFFFFF)
    key = tl.where(difference == 0, key, _NOT_FINITE)
    tl.store(best_out + row * tl.num_programs(1) + program, tl.max(key, 0))


@triton.jit
def _token_kernel(best, tokens_out, programs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    program = tl.arange(0, BLOCK)
    key = tl.load(best + row * programs + program, mask=program < programs, other=-0x7FFFFFFFFFFFFFFF)
    largest = tl.max(key, 0)
    token = 0x7FFFFFFF - (largest & 0xFFFFFFFF)
    tl.store(tokens_out + row, tl.where(largest == _NOT_FINITE, -1, token))

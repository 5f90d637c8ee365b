"""The softmax of the loss in one kernel, which reads every logit from memory once and writes its gradient once.

A program has one row. Its first pass finds the row's maximum and sum; its second pass, which turns the logits into
their gradient, goes through the row backwards, so that it finds most of the row in the cache.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.cross_entropy import chunked
from deepseek_v3.ops.cross_entropy.reference import IGNORED

_WARPS = 32  # one program fills a multiprocessor, so that the rows in flight fit into the cache of an H100
_EACH = 8  # logits side by side: one load of a thread, which keeps their maximum and sum until the row ends
_LANES = 4 * 32 * _WARPS  # loads of one step of a pass: four that a thread does not wait for one by one


def losses_of_rows(logits_TV: Tensor, targets_T: Tensor, with_gradient: bool) -> Tensor:
    """`chunked.LossesOfRows` for float32, bfloat16 and float16 rows whose logits lie side by side.

    A target outside the vocabulary makes the loss NaN.
    """
    losses_T = torch.empty(len(logits_TV), device=logits_TV.device)
    if len(logits_TV):
        _cross_entropy_kernel[(len(logits_TV),)](
            logits_TV,
            logits_TV.stride(0),
            logits_TV.shape[1],
            targets_T.contiguous(),
            losses_T,
            IGNORED,
            WITH_GRADIENT=with_gradient,
            LANES=_LANES,
            EACH=_EACH,
            num_warps=_WARPS,
        )
    return losses_T


linear_cross_entropy = partial(chunked.linear_cross_entropy, losses_of_rows=losses_of_rows)


@triton.jit
def _cross_entropy_kernel(
    logits,
    stride,
    words,
    targets,
    losses,
    IGNORED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    word = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    BLOCK: tl.constexpr = LANES * EACH
    blocks = tl.cdiv(words, BLOCK)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            for block in range(blocks):
                nothing = tl.zeros((LANES, EACH), dtype=logits.dtype.element_ty)
                tl.store(logits + block * BLOCK + word, nothing, mask=block * BLOCK + word < words)
    else:
        inside = (target >= 0) & (target < words)
        chosen = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
        # The lowest float32 instead of -inf: the difference of two of them is 0, not NaN.
        highest = tl.full((LANES,), -3.4028234663852886e38, dtype=tl.float32)
        total = tl.zeros((LANES,), dtype=tl.float32)
        for block in range(blocks):
            at = block * BLOCK + word
            x = tl.load(logits + at, mask=at < words, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            before = highest
            highest = tl.maximum(before, tl.max(x, 1))
            total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest[:, None]), 1)
        most = tl.max(highest, 0)
        total_of_row = tl.sum(total * tl.exp(highest - most), 0)
        tl.store(losses + row, tl.log(total_of_row) - (chosen - most))
        if WITH_GRADIENT:
            share = 1.0 / total_of_row
            for done in range(blocks):
                at = (blocks - 1 - done) * BLOCK + word
                x = tl.load(logits + at, mask=at < words, other=float("-inf"), eviction_policy="evict_first").to(
                    tl.float32
                )
                grad = tl.exp(x - most) * share - (at == target).to(tl.float32)
                tl.store(
                    logits + at, grad.to(logits.dtype.element_ty), mask=at < words, eviction_policy="evict_first"
                )

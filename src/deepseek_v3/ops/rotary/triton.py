"""The queries, keys and values of every head from what the projections return, in one kernel each way.

A program has one token: it reads and writes every number of its heads once, and sums the gradient of the rotary
key, which all heads share, in the order of the heads.

Axes: B batch, S sequence, H heads, N width without position, R rotary width, P = R/2 pairs, V value width,
K = N + R, X = N + V.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.operation import custom_op, fake_of

_HEADS = 8  # heads that a program has in its registers at a time


def join_heads(
    q_BSHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's `join_heads` for float32 and bfloat16; differentiable once. The values are a copy."""
    return _JoinHeads.apply(q_BSHK, kv_BSHX, k_rope_BSR, cos_BSP, sin_BSP)


class _JoinHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_BSP, sin_BSP)
        return _join(q_BSHK, kv_BSHX, k_rope_BSR, cos_BSP, sin_BSP)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q_BSHK: Tensor, grad_k_BSHK: Tensor, grad_v_BSHV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *_join_backward(grad_q_BSHK, grad_k_BSHK, grad_v_BSHV, *ctx.saved_tensors), None, None


@custom_op("join_heads")
def _join(
    q_BSHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    joined = _empty_heads(q_BSHK, kv_BSHX, k_rope_BSR, cos_BSP, sin_BSP)
    inputs = [_with_rows(tensor) for tensor in (q_BSHK, kv_BSHX, k_rope_BSR)]
    strides = (*inputs[0].stride()[:3], *inputs[1].stride()[:3], *inputs[2].stride()[:2])
    _launch(_join_kernel, q_BSHK.shape, joined[2].shape[3], inputs, joined, (cos_BSP, sin_BSP), strides)
    return joined


@custom_op("join_heads_backward")
def _join_backward(
    grad_q_BSHK: Tensor, grad_k_BSHK: Tensor, grad_v_BSHV: Tensor, cos_BSP: Tensor, sin_BSP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values as projected, and of the rotary key."""
    gradients = _empty_gradients(grad_q_BSHK, grad_k_BSHK, grad_v_BSHV, cos_BSP, sin_BSP)
    inputs = [_with_rows(tensor) for tensor in (grad_q_BSHK, grad_k_BSHK, grad_v_BSHV)]
    strides = tuple(stride for tensor in inputs for stride in tensor.stride()[:3])
    shape, value = grad_q_BSHK.shape, grad_v_BSHV.shape[3]
    _launch(_join_backward_kernel, shape, value, inputs, gradients, (cos_BSP, sin_BSP), strides)
    return gradients


@fake_of(_join)
def _empty_heads(
    q_BSHK: Tensor,
    kv_BSHX: Tensor,
    k_rope_BSR: Tensor,
    cos_BSP: Tensor,  # noqa: ARG001 -- the operator's signature
    sin_BSP: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    value = kv_BSHX.shape[3] - (q_BSHK.shape[3] - k_rope_BSR.shape[2])
    return (
        q_BSHK.new_empty(q_BSHK.shape),
        q_BSHK.new_empty(q_BSHK.shape),
        kv_BSHX.new_empty(*q_BSHK.shape[:3], value),
    )


@fake_of(_join_backward)
def _empty_gradients(
    grad_q_BSHK: Tensor,
    grad_k_BSHK: Tensor,  # noqa: ARG001 -- the operator's signature
    grad_v_BSHV: Tensor,
    cos_BSP: Tensor,
    sin_BSP: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = grad_q_BSHK.shape
    rope = 2 * cos_BSP.shape[2]
    expanded = width - rope + grad_v_BSHV.shape[3]
    return (
        grad_q_BSHK.new_empty(grad_q_BSHK.shape),
        grad_q_BSHK.new_empty(batch, length, heads, expanded),
        grad_q_BSHK.new_empty(batch, length, rope),
    )


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if the numbers of its last axis do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(
    kernel: Any,
    shape_of_queries: torch.Size,
    value: int,
    inputs: list[Tensor],
    outputs: tuple[Tensor, ...],
    tables: tuple[Tensor, Tensor],
    strides: tuple[int, ...],
) -> None:
    batch, length, heads, width = shape_of_queries
    pairs = tables[0].shape[2]
    if not batch * length * heads:
        return
    kernel[(batch * length,)](
        *inputs,
        *outputs,
        *(table.contiguous() for table in tables),
        length,
        0 if tables[0].shape[0] == 1 else length * pairs,
        *strides,
        HEADS=heads,
        NOPE=width - 2 * pairs,
        PAIRS=pairs,
        VALUE=value,
        HEAD_BLOCK=min(_HEADS, triton.next_power_of_2(heads)),
        NOPE_BLOCK=triton.next_power_of_2(width - 2 * pairs),
        PAIR_BLOCK=triton.next_power_of_2(pairs),
        VALUE_BLOCK=triton.next_power_of_2(value),
    )


@triton.jit
def _place(length):
    """This program's token, its sequence, and its position in it."""
    token = tl.program_id(0).to(tl.int64)
    return token, token // length, token % length


@triton.jit
def _angles(cos, sin, sequence, position, table_stride, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr):
    """Cosine and sine of every pair, (1, pairs)."""
    pair = tl.arange(0, PAIR_BLOCK)
    at = sequence * table_stride + position * PAIRS + pair
    cosine = tl.load(cos + at, mask=pair < PAIRS, other=0.0)
    sine = tl.load(sin + at, mask=pair < PAIRS, other=0.0)
    return cosine[None, :], sine[None, :]


@triton.jit
def _turn(x, cosine, sine, ROWS: tl.constexpr, PAIR_BLOCK: tl.constexpr):
    """Rotates adjacent pairs of every row in float32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, PAIR_BLOCK, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(turned, (ROWS, 2 * PAIR_BLOCK))


@triton.jit(do_not_specialize=["length", "table_stride"])
def _join_kernel(
    q,
    kv,
    rope,
    q_out,
    k_out,
    v_out,
    cos,
    sin,
    length,
    table_stride,
    q_batch,
    q_token,
    q_head,
    kv_batch,
    kv_token,
    kv_head,
    rope_batch,
    rope_token,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    PAIRS: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    token, sequence, position = _place(length)
    cosine, sine = _angles(cos, sin, sequence, position, table_stride, PAIRS, PAIR_BLOCK)
    kind = q_out.dtype.element_ty
    turning = tl.arange(0, 2 * PAIR_BLOCK)[None, :]
    k_turning = tl.load(
        rope + sequence * rope_batch + position * rope_token + turning, mask=turning < 2 * PAIRS, other=0.0
    )
    k_turned = _turn(k_turning, cosine, sine, 1, PAIR_BLOCK).to(kind)
    plain, value = tl.arange(0, NOPE_BLOCK)[None, :], tl.arange(0, VALUE_BLOCK)[None, :]
    for first in range(0, HEADS, HEAD_BLOCK):
        head = first + tl.arange(0, HEAD_BLOCK)[:, None]
        q_at = q + sequence * q_batch + position * q_token + head * q_head
        kv_at = kv + sequence * kv_batch + position * kv_token + head * kv_head
        out_at = (token * HEADS + head) * WIDTH
        is_plain = (head < HEADS) & (plain < NOPE)
        is_turning = (head < HEADS) & (turning < 2 * PAIRS)
        is_value = (head < HEADS) & (value < VALUE)
        tl.store(q_out + out_at + plain, tl.load(q_at + plain, mask=is_plain), mask=is_plain)
        tl.store(k_out + out_at + plain, tl.load(kv_at + plain, mask=is_plain), mask=is_plain)
        q_turning = tl.load(q_at + NOPE + turning, mask=is_turning, other=0.0)
        q_turned = _turn(q_turning, cosine, sine, HEAD_BLOCK, PAIR_BLOCK).to(kind)
        tl.store(q_out + out_at + NOPE + turning, q_turned, mask=is_turning)
        of_every_head = tl.broadcast_to(k_turned, (HEAD_BLOCK, 2 * PAIR_BLOCK))
        tl.store(k_out + out_at + NOPE + turning, of_every_head, mask=is_turning)
        v_at = v_out + (token * HEADS + head) * VALUE + value
        tl.store(v_at, tl.load(kv_at + NOPE + value, mask=is_value), mask=is_value)


@triton.jit(do_not_specialize=["length", "table_stride"])
def _join_backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    q_out,
    kv_out,
    rope_out,
    cos,
    sin,
    length,
    table_stride,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    PAIRS: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    token, sequence, position = _place(length)
    cosine, sine = _angles(cos, sin, sequence, position, table_stride, PAIRS, PAIR_BLOCK)
    kind = q_out.dtype.element_ty
    turning, plain = tl.arange(0, 2 * PAIR_BLOCK)[None, :], tl.arange(0, NOPE_BLOCK)[None, :]
    value = tl.arange(0, VALUE_BLOCK)[None, :]
    total = tl.zeros((1, 2 * PAIR_BLOCK), dtype=tl.float32)
    for first in range(0, HEADS, HEAD_BLOCK):
        head = first + tl.arange(0, HEAD_BLOCK)[:, None]
        q_at = grad_q + sequence * q_batch + position * q_token + head * q_head
        k_at = grad_k + sequence * k_batch + position * k_token + head * k_head
        v_at = grad_v + sequence * v_batch + position * v_token + head * v_head
        q_out_at = q_out + (token * HEADS + head) * WIDTH
        kv_out_at = kv_out + (token * HEADS + head) * (NOPE + VALUE)
        is_plain = (head < HEADS) & (plain < NOPE)
        is_turning = (head < HEADS) & (turning < 2 * PAIRS)
        is_value = (head < HEADS) & (value < VALUE)
        tl.store(q_out_at + plain, tl.load(q_at + plain, mask=is_plain), mask=is_plain)
        q_turning = tl.load(q_at + NOPE + turning, mask=is_turning, other=0.0)
        q_turned = _turn(q_turning, cosine, -sine, HEAD_BLOCK, PAIR_BLOCK).to(kind)
        tl.store(q_out_at + NOPE + turning, q_turned, mask=is_turning)
        tl.store(kv_out_at + plain, tl.load(k_at + plain, mask=is_plain), mask=is_plain)
        tl.store(kv_out_at + NOPE + value, tl.load(v_at + value, mask=is_value), mask=is_value)
        k_turning = tl.load(k_at + NOPE + turning, mask=is_turning, other=0.0)
        total += tl.sum(k_turning.to(tl.float32), 0)[None, :]
    turned = _turn(total, cosine, -sine, 1, PAIR_BLOCK).to(kind)
    tl.store(rope_out + token * (2 * PAIRS) + turning, turned, mask=turning < 2 * PAIRS)

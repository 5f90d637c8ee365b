"""The same in one kernel for all tensors, which finds them by their addresses.

Launching a kernel for each of the hundreds of parameters of a model, and making views of each, keeps a CPU longer
than the work itself keeps a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.multi_tensor.reference import AdamWStep

_BLOCK = 4096
_ALIGNED = 16  # bytes; then numbers are moved in fours


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    scale: Tensor,
    step: AdamWStep,
) -> None:
    gradients = [gradient.float().contiguous() for gradient in gradients]
    if not any(parameter.numel() for parameter in parameters):
        return
    blocks = _blocks(tuple(parameter.numel() for parameter in parameters), scale.device)
    table, aligned = _addresses([*parameters, *gradients, *means, *squares], scale.device)
    shares = 1 - step.beta1, 1 - step.beta2
    _adamw_kernel[(blocks.number,)](
        table,
        *blocks.tables,
        scale.float(),
        *step,
        *shares,
        len(parameters),
        _TYPES[means[0].dtype],
        aligned,
        _BLOCK,
        num_warps=8,
    )


def sum_of_squares(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    device = tensors[0].device
    tensors = [tensor.float().contiguous() for tensor in tensors]
    blocks = _blocks(tuple(tensor.numel() for tensor in tensors), device)
    table, aligned = _addresses(tensors, device)
    sums = torch.empty(blocks.number, device=device)
    _squares_kernel[(blocks.number,)](
        table, *blocks.tables, _weights(tuple(weights), device), sums, aligned, _BLOCK, num_warps=8
    )
    return sums.sum()


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class _Blocks(NamedTuple):
    """Tensors of certain sizes in blocks: of which tensor each is, where in it it begins; and all sizes."""

    number: int
    tables: tuple[Tensor, Tensor, Tensor]


@cache
def _blocks(sizes: tuple[int, ...], device: torch.device) -> _Blocks:
    size_N = torch.tensor(sizes, dtype=torch.int64)
    blocks_N = -(-size_N // _BLOCK)
    tensor_B = torch.arange(len(sizes)).repeat_interleave(blocks_N)
    before_N = blocks_N.cumsum(0) - blocks_N
    first_B = (torch.arange(len(tensor_B)) - before_N[tensor_B]) * _BLOCK
    return _Blocks(len(tensor_B), (tensor_B.int().to(device), first_B.to(device), size_N.to(device)))


@cache
def _weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _addresses(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """Where the tensors begin, int64 on the device, and whether vectors can be loaded there."""
    found = [tensor.data_ptr() for tensor in tensors]
    table = torch.tensor(found, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), all(address % _ALIGNED == 0 for address in found)


@triton.jit
def _begin(table: Any, tensor: Any, type: tl.constexpr, aligned: tl.constexpr) -> Any:
    begin = tl.load(table + tensor).to(tl.pointer_type(type))
    if aligned:
        begin = tl.multiple_of(begin, 16)
    return begin


@triton.jit
def _adamw_kernel(
    table: Any,
    tensor_of: Any,
    first_of: Any,
    size_of: Any,
    scale: Any,
    decay: Any,
    size: Any,
    correction: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    mean_share: Any,
    square_share: Any,
    count: Any,
    moment: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tensor = tl.load(tensor_of + tl.program_id(0))
    place = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK)
    inside = place < tl.load(size_of + tensor)
    parameter_at = _begin(table, tensor, tl.float32, aligned) + place
    gradient_at = _begin(table + count, tensor, tl.float32, aligned) + place
    mean_at = _begin(table + 2 * count, tensor, moment, aligned) + place
    square_at = _begin(table + 3 * count, tensor, moment, aligned) + place
    gradient = tl.load(gradient_at, mask=inside, other=0.0) * tl.load(scale)
    mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32) * beta1 + gradient * mean_share
    square = tl.load(square_at, mask=inside, other=0.0).to(tl.float32) * beta2 + gradient * gradient * square_share
    direction = mean / (tl.sqrt(square * correction) + eps)
    parameter = tl.load(parameter_at, mask=inside, other=0.0)
    tl.store(parameter_at, parameter * decay - direction * size, mask=inside)
    tl.store(mean_at, mean.to(moment), mask=inside)
    tl.store(square_at, square.to(moment), mask=inside)


@triton.jit
def _squares_kernel(
    table: Any,
    tensor_of: Any,
    first_of: Any,
    size_of: Any,
    weight_of: Any,
    sums: Any,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tensor = tl.load(tensor_of + tl.program_id(0))
    place = tl.load(first_of + tl.program_id(0)) + tl.arange(0, BLOCK)
    inside = place < tl.load(size_of + tensor)
    values = tl.load(_begin(table, tensor, tl.float32, aligned) + place, mask=inside, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(values * values) * tl.load(weight_of + tensor))

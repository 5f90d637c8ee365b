"""AdamW and sums of squares in one kernel for all tensors, which reads the tensors' addresses from a table.

For the hundreds of parameters of a model, launching one kernel each and making views of each takes the CPU longer
than the work itself takes the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_v3.ops.multi_tensor.reference import AdamWStep

_BLOCK = 4096
_VECTOR = 4  # numbers that are loaded at once, if the addresses and sizes of all tensors are multiples of it


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
    factors = (
        torch.as_tensor(value, dtype=torch.float32, device=scale.device) for value in (step.size, step.correction)
    )
    shares = 1 - step.beta1, 1 - step.beta2
    _adamw_kernel[(blocks.number,)](
        table,
        *blocks.tables,
        scale.float(),
        *factors,
        step.decay,
        step.beta1,
        step.beta2,
        step.eps,
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
    """Tensors cut into blocks of `_BLOCK` numbers.

    `tables`: for each block its tensor (int32) and its first index in that tensor (int64); for each tensor its
    size (int64).
    """

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
    """The addresses of the tensors, int64 on the device, and whether all allow loads of `_VECTOR` numbers."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    starts_aligned = all(tensor.data_ptr() % (_VECTOR * tensor.element_size()) == 0 for tensor in tensors)
    sizes_aligned = all(tensor.numel() % _VECTOR == 0 for tensor in tensors)
    return table.to(device, non_blocking=True), starts_aligned and sizes_aligned


@triton.jit
def _begin(table, tensor, type: tl.constexpr, aligned: tl.constexpr):
    begin = tl.load(table + tensor).to(tl.pointer_type(type))
    if aligned:
        begin = tl.multiple_of(begin, 4 * (type.primitive_bitwidth // 8))
    return begin


@triton.jit
def _places(first_of, size_at, aligned: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of this block in its tensor, and which of them are below the tensor's size."""
    first = tl.multiple_of(tl.load(first_of + tl.program_id(0)), BLOCK)
    size = tl.load(size_at)  # loaded here: the compiler forgets that an argument is a multiple of 4
    if aligned:
        size = tl.multiple_of(size, 4)
    place = first + tl.arange(0, BLOCK)
    return place, place < size


@triton.jit
def _adamw_kernel(
    table,
    tensor_of,
    first_of,
    size_of,
    scale_at,
    size_at,
    correction_at,
    decay,
    beta1,
    beta2,
    eps,
    mean_share,
    square_share,
    count,
    moment: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale, size, correction = tl.load(scale_at), tl.load(size_at), tl.load(correction_at)
    if scale != scale:  # NaN: everything stays as it is
        return
    tensor = tl.load(tensor_of + tl.program_id(0))
    place, inside = _places(first_of, size_of + tensor, aligned, BLOCK)
    parameter_at = _begin(table, tensor, tl.float32, aligned) + place
    gradient_at = _begin(table + count, tensor, tl.float32, aligned) + place
    mean_at = _begin(table + 2 * count, tensor, moment, aligned) + place
    square_at = _begin(table + 3 * count, tensor, moment, aligned) + place
    gradient = tl.load(gradient_at, mask=inside, other=0.0) * scale
    mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32) * beta1 + gradient * mean_share
    square = tl.load(square_at, mask=inside, other=0.0).to(tl.float32) * beta2 + gradient * gradient * square_share
    direction = mean / (tl.sqrt(square * correction) + eps)
    parameter = tl.load(parameter_at, mask=inside, other=0.0)
    tl.store(parameter_at, parameter * decay - direction * size, mask=inside)
    tl.store(mean_at, mean.to(moment), mask=inside)
    tl.store(square_at, square.to(moment), mask=inside)


@triton.jit
def _squares_kernel(
    table,
    tensor_of,
    first_of,
    size_of,
    weight_of,
    sums,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(tensor_of + tl.program_id(0))
    place, inside = _places(first_of, size_of + tensor, aligned, BLOCK)
    values = tl.load(_begin(table, tensor, tl.float32, aligned) + place, mask=inside, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(values * values) * tl.load(weight_of + tensor))

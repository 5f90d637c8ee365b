"""One operation at one size: its inputs, its floor, who computes it, and what the result must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek_v3.ops.operation import Operation, Target

Made = TypeVar("Made")
Outputs = Sequence[Tensor]
Run = Callable[[int], Any]

_CACHE_BYTES = 2**28  # more than any cache; inputs that are smaller are copied until all copies together are not


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without: operations of products, in 8-bit numbers or not, and bytes moved."""

    operations: float = 0.0
    num_bytes: float = 0.0
    in_fp8: bool = False


@dataclass(frozen=True)
class Prepared:
    """The inputs of a case on a device.

    `systems` computes the operation on copy `call` of the inputs, by name; a value that is text says why that
    system cannot. `expected` computes the result of call 0, in float64 where it is not to be exact. `comparable`
    lists the tensors of a result that are compared; their relative error may be at most `bound`.
    """

    systems: Mapping[str, Run | str]
    expected: Callable[[], Any]
    bound: float
    comparable: Callable[[Any], Outputs] = list


@dataclass(frozen=True)
class Case:
    """An operation at one size; `prepare` allocates its inputs on a device."""

    operation: str
    function: str
    size: str
    work: Work
    prepare: Callable[[torch.device], Prepared]


def backends(operation: Operation[Any], target: Target) -> Iterator[tuple[str, Any]]:
    """The back ends that can run at a target, by name; without the reference on a GPU: it is not made for speed."""
    for name, backend in operation.backends.items():
        if backend.obstacle(target) is None and not (name == "reference" and target.device.type == "cuda"):
            yield name, backend.load()


def rotated(device: torch.device, make: Callable[[], Made], num_bytes: float) -> Callable[[int], Made]:
    """Inputs for each call, on a GPU more different ones than a cache holds; `num_bytes` is the size of one."""
    copies = 1 if device.type != "cuda" else max(1, -(-_CACHE_BYTES // max(1, int(num_bytes))))
    made = [make() for _ in range(copies)]
    return lambda call: made[call % copies]


def relative_error(found: Outputs, expected: Outputs) -> float:
    """The largest error of the outputs, relative: that of the norm, or a twentieth of the largest single one."""
    return max(_relative_error(*pair) for pair in zip(found, expected, strict=True))


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference, wide = found.double() - expected.double(), expected.double()
    if not difference.numel():
        return 0.0
    size, largest = wide.norm(), wide.abs().amax()
    if not bool(difference.isfinite().all()):
        return float("inf")
    whole = difference.norm() / size.clamp(min=1e-30)
    single = difference.abs().amax() / largest.clamp(min=1e-30) / 20
    return max(whole.item(), single.item())

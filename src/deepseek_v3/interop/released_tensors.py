"""Tensors as released checkpoints hold them: what is wrong with a set of them, and their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from deepseek_v3.ops.fp8 import BLOCK, E4M3, dequantize_128x128
from deepseek_v3.utils.errors import CheckpointError

_SCALES = "_scale_inv"  # behind the name of a weight in FP8
_MOST_NAMED = 3
_WEIGHT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], copies: Mapping[str, str]) -> None:
    """Raises one CheckpointError with everything that keeps `found` from filling `expected`, by released name.

    `copies`: names that may be left out, each with that of the tensor whose values it must repeat.
    """
    problems = [*_wrong_names(expected, found, copies)]
    for name, tensor in found.items():
        target = expected.get(copies.get(name, name))
        if target is not None:
            problems += _wrong_tensor(name, tensor, target, found)
    problems += _wrong_copies(copies, found)
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(_shortened(problems))}")


def released_values(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The values of a tensor: those of one in FP8 in float32, times its scales; of all others as they are."""
    tensor = tensors[name]
    return dequantize_128x128(tensor, tensors[name + _SCALES], torch.float32) if tensor.dtype == E4M3 else tensor


def _wrong_names(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], copies: Mapping[str, str]
) -> Iterator[str]:
    scales = {name + _SCALES for name, tensor in found.items() if tensor.dtype == E4M3}
    missing = sorted(expected.keys() - found.keys() - copies.keys())
    left_over = sorted(found.keys() - expected.keys() - copies.keys() - scales)
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            yield f"{len(names)} {what}: {_named(names)}"


def _wrong_tensor(name: str, tensor: Tensor, target: Tensor, found: Mapping[str, Tensor]) -> Iterator[str]:
    if tensor.shape != target.shape:
        yield f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
    elif tensor.is_meta:
        yield f"{name}: has a shape but no values (device meta); load it to a real device"
    elif tensor.dtype == E4M3:
        yield from _wrong_scales(name, tensor, found.get(name + _SCALES))
    elif tensor.dtype not in _WEIGHT_TYPES:
        types = ", ".join(map(_name_of, _WEIGHT_TYPES))
        yield f"{name}: found type {_name_of(tensor.dtype)}, expected {types}, or {_name_of(E4M3)} with scales"


def _wrong_scales(name: str, tensor: Tensor, scales: Tensor | None) -> Iterator[str]:
    if tensor.ndim != 2:
        found = f"type {_name_of(tensor.dtype)} and shape {tuple(tensor.shape)}"
        yield f"{name}: found {found}, expected FP8 for matrices only"
        return
    shape = tuple(-(-size // BLOCK) for size in tensor.shape)
    if scales is None:
        yield (
            f"{name}: is in FP8 without {name}{_SCALES}, expected its scales, one for each {BLOCK}×{BLOCK} block; "
            "load them with the weights, or convert these to bfloat16 first"
        )
    elif tuple(scales.shape) != shape:
        yield f"{name}{_SCALES}: found shape {tuple(scales.shape)}, expected {shape} for blocks of {BLOCK}×{BLOCK}"
    elif not scales.is_floating_point() or scales.is_meta:
        found = f"type {_name_of(scales.dtype)} on {scales.device}"
        yield f"{name}{_SCALES}: found {found}, expected values of a float type"


def _wrong_copies(copies: Mapping[str, str], found: Mapping[str, Tensor]) -> Iterator[str]:
    for copy, original in copies.items():
        if copy in found and original in found:
            one, other = found[copy], found[original]
            comparable = one.dtype in _WEIGHT_TYPES and other.dtype in _WEIGHT_TYPES
            if comparable and one.shape == other.shape and not (one.is_meta or other.is_meta or _equal(one, other)):
                yield f"{copy} differs from {original}, which this model shares with it"


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device))


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - 2 * _MOST_NAMED
    return problems if more <= 0 else [*problems[: 2 * _MOST_NAMED], f"and {more} more problems"]


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names[:_MOST_NAMED])}{', …' if len(names) > _MOST_NAMED else ''}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

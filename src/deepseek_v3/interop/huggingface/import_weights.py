"""Checks weights under the names of the released checkpoint, and loads them into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface.fp8_weights import released_values, scales_name, scales_problems, type_name
from deepseek_v3.interop.huggingface.names import layer_of, shared_copies, to_released_names
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.fp8 import E4M3
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger

_MOST_NAMES = 3  # names that a message lists of one kind of problem
_WEIGHT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_log = get_logger("Weights")


@torch.no_grad()
def load_released(model: DeepSeekV3, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by released name into `model`, converted to the model's type and device.

    A model on the meta device is moved to the CPU. A weight in FP8 (e4m3) needs its scales, `<name>_scale_inv`, one
    per 128×128 block. The copies of embedding and head in MTP layers may be missing; if present, they must equal
    the originals. If the last MTP layers are missing as a whole, they are removed from the model, with a warning.

    Raises CheckpointError with all problems, before anything is changed: missing and unexpected names, wrong
    shapes, types that weights cannot have, FP8 without scales, and copies that differ.
    """
    config, depth = model.config, _num_mtp_layers(model.config, tensors)
    found_config = config.model_copy(update={"num_nextn_predict_layers": depth})
    first_absent = config.num_hidden_layers + depth
    targets = {name: t for name, t in model.state_dict().items() if layer_of(name) < first_absent}
    check_tensors(to_released_names(found_config, targets), tensors, shared_copies(found_config))
    if depth < config.num_nextn_predict_layers:
        _log.warning(
            "the weights hold %d of the %d MTP layers of the config and nothing of model.layers.%d: the model "
            "continues with num_nextn_predict_layers = %d",
            depth,
            config.num_nextn_predict_layers,
            first_absent,
            depth,
        )
        model.keep_mtp_layers(depth)
    if any(tensor.is_meta for tensor in targets.values()):
        model.to_empty(device="cpu")
    copies = shared_copies(found_config)
    for name, target in to_released_names(found_config, model.state_dict()).items():
        if name not in copies:
            target.copy_(released_values(tensors, name))


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], copies: Mapping[str, str]) -> None:
    """Raises one CheckpointError with all problems that keep `found` from filling `expected`, by released name.

    `copies` maps names that may be missing to the names of the tensors whose values they must repeat.
    """
    problems = [*_name_problems(expected, found, copies)]
    for name, tensor in found.items():
        target = expected.get(copies.get(name, name))
        if target is not None:
            problems += _tensor_problems(name, tensor, target, found)
    problems += _copy_problems(copies, found)
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(_shorten(problems))}")


def _num_mtp_layers(config: ModelConfig, names: Iterable[str]) -> int:
    """The number of MTP layers up to the last one with any tensor among `names`; at most the config's."""
    last = max(map(layer_of, names), default=-1)
    return min(max(last + 1 - config.num_hidden_layers, 0), config.num_nextn_predict_layers)


def _name_problems(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], copies: Mapping[str, str]
) -> Iterator[str]:
    scales = {scales_name(name) for name, tensor in found.items() if tensor.dtype == E4M3}
    missing = sorted(expected.keys() - found.keys() - copies.keys())
    unexpected = sorted(found.keys() - expected.keys() - copies.keys() - scales)
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            listed = ", ".join(names[:_MOST_NAMES])
            yield f"{len(names)} {kind}: {listed}{', …' if len(names) > _MOST_NAMES else ''}"


def _tensor_problems(name: str, tensor: Tensor, target: Tensor, found: Mapping[str, Tensor]) -> Iterator[str]:
    if tensor.shape != target.shape:
        yield f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(target.shape)}"
    elif tensor.is_meta:
        yield f"{name}: has a shape but no values (device meta); load it to a real device"
    elif tensor.dtype == E4M3:
        yield from scales_problems(name, tensor, found.get(scales_name(name)))
    elif tensor.dtype not in _WEIGHT_TYPES:
        types = ", ".join(map(type_name, _WEIGHT_TYPES))
        yield f"{name}: found type {type_name(tensor.dtype)}, expected {types}, or {type_name(E4M3)} with scales"


def _copy_problems(copies: Mapping[str, str], found: Mapping[str, Tensor]) -> Iterator[str]:
    for copy, original in copies.items():
        if copy in found and original in found:
            one, other = found[copy], found[original]
            comparable = one.dtype in _WEIGHT_TYPES and other.dtype in _WEIGHT_TYPES
            if comparable and one.shape == other.shape and not (one.is_meta or other.is_meta or _equal(one, other)):
                yield f"{copy} differs from {original}, which this model shares with it"


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device))


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - 2 * _MOST_NAMES
    return problems if more <= 0 else [*problems[: 2 * _MOST_NAMES], f"and {more} more problems"]

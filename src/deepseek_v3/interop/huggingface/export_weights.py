"""Writes a model as safetensors files under the names of the released checkpoint, in its own types or in FP8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek_v3.interop.huggingface.fp8_weights import is_quantized, scales_name, type_name
from deepseek_v3.interop.huggingface.names import shared_copies, to_released_names
from deepseek_v3.interop.huggingface.tensor_source import WEIGHTS_FILE, WEIGHTS_INDEX
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.fp8 import BLOCK, E4M3, quantize_128x128
from deepseek_v3.utils.checkpointing.checks import non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.safetensors_file import write_tensors
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import write_synced
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay

_BIAS = "e_score_correction_bias"  # float32 in every release: it moves by less than bfloat16 can hold
_METADATA = {"format": "pt"}  # what Transformers expects in the header

_log = get_logger("Weights")


def released_state(model: DeepSeekV3) -> dict[str, Tensor]:
    """Every weight and routing bias of `model` by released name, detached and contiguous, as safetensors needs it.

    Experts are views of their stacks, which do not overlap. The copies of embedding and head are cloned.
    """
    copies = shared_copies(model.config).keys()
    return {name: t.clone() if name in copies else t.contiguous() for name, t in _all_tensors(model).items()}


def write_weights(
    folder: Path, model: DeepSeekV3, dtype: torch.dtype | None, quantized: bool, max_shard_bytes: int
) -> None:
    """Writes the weights of `model` to `folder`: one file, or several of at most `max_shard_bytes` with an index.

    Weights are converted to `dtype`, and routing biases to float32; without `dtype` each tensor keeps its type.
    With `quantized`, those that the release has in FP8 are written in FP8 with their scales. Memory holds one file
    at a time.

    Raises CheckpointError for weights that are not finite, also only after the conversion, and OSError.
    """
    tensors = _all_tensors(model)
    shards = _in_shards(tensors, dtype, quantized, max_shard_bytes)
    files = [WEIGHTS_FILE] if len(shards) == 1 else _file_names(len(shards))
    places: dict[str, str] = {}
    num_bytes = 0
    total = sum(tensor.numel() for tensor in tensors.values())
    with ProgressDisplay() as display, display.task("Exporting", total, "parameters", _log) as task:
        for file, names in zip(files, shards, strict=True):
            converted = {
                name: value
                for released in names
                for name, value in _converted(released, tensors[released], dtype, quantized)
            }
            _check_finite(converted)
            num_bytes += sum(tensor.nbytes for tensor in converted.values())
            places |= dict.fromkeys(converted, file)
            write_tensors(folder / file, converted, _METADATA)
            task.advance(sum(tensors[released].numel() for released in names))
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}
        write_synced(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor to be written holds NaN or infinity, in FP8 in its scales."""
    if bad := non_finite({name: tensor for name, tensor in tensors.items() if tensor.dtype != E4M3}):
        raise CheckpointError(
            f"the model: {non_finite_summary(bad)} in {type_name(tensors[bad[0]].dtype)}; export an earlier "
            "checkpoint, or in a type with a larger range, such as bfloat16"
        )


def _all_tensors(model: DeepSeekV3) -> dict[str, Tensor]:
    """Every weight and routing bias by released name, with a copy of the embedding for a tied head.

    vLLM's DeepSeek-V3 always has a head of its own: without the copy it stays at zero, with no error.
    """
    released = to_released_names(model.config, model.state_dict())
    return released | {copy: released[original] for copy, original in shared_copies(model.config).items()}


def _file_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _in_shards(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, quantized: bool, max_shard_bytes: int
) -> list[list[str]]:
    """The names of the tensors of each file, in order; a tensor above `max_shard_bytes` has a file of its own."""
    shards: list[list[str]] = []
    left = 0
    for name, tensor in tensors.items():
        size = _stored_bytes(name, tensor, dtype, quantized)
        if not shards or size > left:
            shards.append([])
            left = max_shard_bytes
        shards[-1].append(name)
        left -= size
    return shards


def _stored_bytes(name: str, tensor: Tensor, dtype: torch.dtype | None, quantized: bool) -> int:
    """The bytes of a released tensor as it is stored, with its scales."""
    if quantized and is_quantized(name):
        rows, columns = tensor.shape
        return tensor.numel() + -(-rows // BLOCK) * -(-columns // BLOCK) * torch.float32.itemsize
    return tensor.numel() * _stored_type(name, tensor, dtype).itemsize


def _stored_type(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return tensor.dtype
    return torch.float32 if name.endswith(_BIAS) else dtype


def _converted(
    name: str, tensor: Tensor, dtype: torch.dtype | None, quantized: bool
) -> Iterator[tuple[str, Tensor]]:
    """A released tensor as it is stored, on the CPU; one in FP8 is followed by its scales."""
    if quantized and is_quantized(name):
        values, scales = quantize_128x128(tensor)
        yield name, values.cpu()
        yield scales_name(name), scales.cpu()
    else:
        yield name, tensor.to(_stored_type(name, tensor, dtype)).cpu().contiguous()

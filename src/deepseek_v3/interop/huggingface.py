"""Weights under the names of the released checkpoint, in and out.

The names agree but for three things: routed experts are stacked here and stand one by one there; each
prediction layer there repeats the embedding and the head that it shares; tied models there have no head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.released_tensors import check_tensors, released_values
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.logging import get_logger

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.")
_EXPERTS = re.compile(r"(?P<mlp>model\.layers\.\d+\.mlp)\.experts\.(?P<stack>gate_up_proj|down_proj)")

_log = get_logger("Weights")


def released_state(model: DeepSeekV3) -> dict[str, Tensor]:
    """Every weight and bias of `model` under its released name, detached and contiguous, as safetensors saves it.

    Experts are views of their stacks, which do not overlap. What prediction layers repeat is copied.
    """
    released = to_released_names(model.config, model.state_dict())
    copies = _shared_copies(model.config).keys()
    return {name: t.clone() if name in copies else t.contiguous() for name, t in released.items()}


def to_released_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and unstacks tensors that go by this project's parameter names: weights, or their gradients."""
    released: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match is None:
            released[name] = tensor
        elif match["stack"] == "down_proj":
            released |= {_expert(match["mlp"], e, "down_proj"): part for e, part in enumerate(tensor)}
        else:
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                released[_expert(match["mlp"], e, "gate_proj")] = gate
                released[_expert(match["mlp"], e, "up_proj")] = up
    for copy, original in _shared_copies(config).items():
        if original in released and copy != _HEAD:
            released[copy] = released[original]
    return released


@torch.no_grad()
def load_released(model: DeepSeekV3, tensors: Mapping[str, Tensor]) -> None:
    """Fills `model` from tensors by released name; values are converted to the model's type and device.

    A model on the meta device gets memory on the CPU. Weights in FP8 (e4m3) come with a scale for each 128×128
    block, `<name>_scale_inv`. The copies of embedding and head in prediction layers may be left out, and must equal
    the originals where present. Prediction layers of which nothing is present, the last one or several, are taken
    away from the model, with a warning.

    Raises CheckpointError, before anything is changed, with all problems: names that are missing or left over,
    shapes that differ, types that are no weights, FP8 without scales, and copies that disagree.
    """
    config, depth = model.config, _depth_held(model.config, tensors)
    held = config.model_copy(update={"num_nextn_predict_layers": depth})
    first_absent = config.num_hidden_layers + depth
    ours = {n: t for n, t in model.state_dict().items() if _layer_of(n) < first_absent}
    check_tensors(to_released_names(held, ours), tensors, _shared_copies(held))
    if depth < config.num_nextn_predict_layers:
        _log.warning(
            "the weights hold %d of the %d prediction layers of the config, nothing of model.layers.%d: the model "
            "goes on with num_nextn_predict_layers = %d",
            depth,
            config.num_nextn_predict_layers,
            first_absent,
            depth,
        )
        model.keep_mtp_layers(depth)
    if any(tensor.is_meta for tensor in ours.values()):
        model.to_empty(device="cpu")
    copies = _shared_copies(held)
    for name, target in to_released_names(held, model.state_dict()).items():
        if name not in copies:
            target.copy_(released_values(tensors, name))


def _depth_held(config: ModelConfig, tensors: Iterable[str]) -> int:
    """How many prediction layers there are, up to the last of which anything is present."""
    last = max((_layer_of(name) for name in tensors), default=-1)
    return min(max(last + 1 - config.num_hidden_layers, 0), config.num_nextn_predict_layers)


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 for those outside."""
    match = _LAYER.match(name)
    return int(match["layer"]) if match else -1


def _expert(mlp: str, index: int, projection: str) -> str:
    return f"{mlp}.experts.{index}.{projection}.weight"


def _shared_copies(config: ModelConfig) -> dict[str, str]:
    """Released names that may repeat a weight of the main model, and the name of that weight."""
    head = _EMBEDDING if config.tie_word_embeddings else _HEAD
    copies = {_HEAD: _EMBEDDING} if config.tie_word_embeddings else {}
    main, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    for layer in range(main, main + depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = _EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies

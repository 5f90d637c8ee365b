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
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import CheckpointError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EXPERTS = re.compile(r"(?P<mlp>model\.layers\.\d+\.mlp)\.experts\.(?P<stack>gate_up_proj|down_proj)")


def released_state(model: DeepSeekV3) -> dict[str, Tensor]:
    """Every weight and bias of `model` under its released name, as views where possible, detached."""
    return to_released_names(model.config, model.state_dict())


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

    The copies of embedding and head in prediction layers may be left out, and must equal the originals where
    present. Raises CheckpointError, before anything is changed, for names that are missing or left over, for
    shapes that differ, and for copies that disagree.
    """
    expected = to_released_names(model.config, model.state_dict())
    copies = _shared_copies(model.config)
    _check_names(expected.keys(), tensors.keys(), optional=copies.keys())
    _check_shapes(expected | {copy: expected[original] for copy, original in copies.items()}, tensors)
    _check_copies(copies, tensors)
    for name, target in expected.items():
        if name not in copies:
            target.copy_(tensors[name])


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


def _check_names(expected: Iterable[str], found: Iterable[str], optional: Iterable[str]) -> None:
    missing = sorted(set(expected) - set(found) - set(optional))
    left_over = sorted(set(found) - set(expected) - set(optional))
    if missing or left_over:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("left over", left_over))
            if names
        ]
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(parts)}")


def _check_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )


def _check_copies(copies: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for copy, original in copies.items():
        if copy in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise CheckpointError(f"{copy} differs from {original}, which this model shares with it")

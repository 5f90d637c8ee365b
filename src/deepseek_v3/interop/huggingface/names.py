"""The names of the released checkpoint, and how they differ from this project's parameter names.

They differ in three points. This project stacks the routed experts of a layer; the released checkpoint holds each
expert's matrices separately. The released MTP layers repeat the embedding and the head, which they share with the
main model. A released model with tied embeddings has no head, or a copy of the embedding as its head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(?P<layer>[0-9]{1,9})\.")
_EXPERTS = re.compile(r"(?P<mlp>model\.layers\.\d+\.mlp)\.experts\.(?P<stack>gate_up_proj|down_proj)")


class Part(NamedTuple):
    """A released tensor: `rows` of a parameter of this project, of one `expert` if that is a stack of experts."""

    name: str
    rows: range
    expert: int | None = None


def parts_of(name: str, shape: Sequence[int]) -> Iterator[Part]:
    """The released tensors that make up a parameter of this name and shape, in the order of experts and rows."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        yield Part(name, range(shape[0]))
        return
    experts, rows = shape[0], shape[1]
    projections = ("down_proj",) if match["stack"] == "down_proj" else ("gate_proj", "up_proj")
    size = rows // len(projections)
    for expert in range(experts):
        for number, projection in enumerate(projections):
            released = f"{match['mlp']}.experts.{expert}.{projection}.weight"
            yield Part(released, range(number * size, (number + 1) * size), expert)


def to_released_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and unstacks tensors by this project's parameter names: weights, or their gradients.

    Experts are views of their stacks. The copies in MTP layers are the same tensors as their originals.
    """
    released: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part in parts_of(name, tensor.shape):
            rows = slice(part.rows.start, part.rows.stop)
            released[part.name] = tensor if part.expert is None else tensor[part.expert, rows]
    for copy, original in shared_copies(config).items():
        if original in released and copy != _HEAD:
            released[copy] = released[original]
    return released


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Released names that may repeat a weight of the main model, each with the name of that weight."""
    head = _EMBEDDING if config.tie_word_embeddings else _HEAD
    copies = {_HEAD: _EMBEDDING} if config.tie_word_embeddings else {}
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    for layer in range(first, first + depth):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = _EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 for a tensor outside all layers."""
    match = _LAYER.match(name)
    return int(match["layer"]) if match else -1

"""Less memory for more work: running parts of the forward pass again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.transformer import DeepSeekV3


def recompute(model: DeepSeekV3, what: Literal["none", "selective", "full"]) -> None:
    """Runs whole layers again (`full`), or of each layer what keeps most for its time: the feed-forward network."""
    if what == "full":
        model.run_layer = _recomputing
    elif what == "selective":
        for layer in model.model.layers:
            if isinstance(layer, DecoderLayer):
                layer.run_feed_forward = _recomputing


def _recomputing(module: nn.Module, *inputs: Any) -> Any:
    """Runs a module now and once more in the backward pass, keeping only its inputs between."""
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)

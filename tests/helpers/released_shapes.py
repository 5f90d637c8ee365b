"""Small configs with the fields of published models, and the weights of a Hugging Face directory."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from deepseek_v3.config.model_config import RopeScaling
from helpers.models import YARN

_KIMI_YARN = RopeScaling(
    factor=32, beta_fast=1, beta_slow=1, mscale=1, mscale_all_dim=1, original_max_position_embeddings=16
)
# Fields of Kimi-K2 and Moonlight that differ from those of DeepSeek-V3.
KIMI_K2: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 12,
    "rope_theta": 50000.0,
    "rope_scaling": _KIMI_YARN,
    "routed_scaling_factor": 2.827,
}
MOONLIGHT: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
}
SHAPES: dict[str, dict[str, Any]] = {
    "one MTP layer": {"num_nextn_predict_layers": 1},
    "two MTP layers, YaRN": {"num_nextn_predict_layers": 2, "rope_scaling": YARN},
    "tied, MTP": {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
    "no dense layer, no shared expert": {"first_k_dense_replace": 0, "n_shared_experts": 0},
    "dense, MoE in MTP": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 1},
    "Kimi-K2": KIMI_K2,
    "Moonlight": MOONLIGHT,
}


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, as the safetensors library reads them."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}

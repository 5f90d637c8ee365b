"""The same model in Transformers, and its tensors under the names of the released checkpoint.

The renaming is implemented here a second time, so that tests notice a mistake in `deepseek_v3.interop`.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from deepseek_v3.config.model_config import ModelConfig
from helpers.models import fill_with_noise

_OURS_ALONE = {
    "rope_theta",
    "rope_scaling",
    "num_nextn_predict_layers",
    "scoring_func",
    "topk_method",
    "moe_layer_freq",
}


def transformers_config(config: ModelConfig) -> DeepseekV3Config:
    fields = config.model_dump(exclude=_OURS_ALONE)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.model_dump()
    return DeepseekV3Config(**fields, rope_parameters=rope, num_mtp_layers=config.num_nextn_predict_layers)


def transformers_model(config: ModelConfig) -> DeepseekV3ForCausalLM:
    """Its plain attention path, with weights that differ from zero and one everywhere."""
    model = DeepseekV3ForCausalLM._from_config(transformers_config(config), attn_implementation="eager")
    fill_with_noise(model)
    return model


def released_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes apart the stacked experts; every other name is the released one already."""
    released: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, stacked, projection = name.partition(".experts.")
        if not stacked:
            released[name] = tensor
            continue
        for index, weight in enumerate(tensor):
            expert = f"{prefix}.experts.{index}"
            if projection == "down_proj":
                released[f"{expert}.down_proj.weight"] = weight
            else:
                half = weight.shape[0] // 2
                released[f"{expert}.gate_proj.weight"] = weight[:half]
                released[f"{expert}.up_proj.weight"] = weight[half:]
    return released

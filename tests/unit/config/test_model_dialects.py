"""The dialects in which a DeepSeek-V3 model's config.json is written, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.config.model_config import ModelConfig, RopeScaling
from deepseek_v3.utils.errors import ConfigError
from helpers.models import small_config

YARN = {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
ORIGINAL = {"original_max_position_embeddings": 4096}
# The fields that fine-tuning tools, other releases and Transformers add, and that change no shape.
ADDED: dict[str, Any] = {
    "_name_or_path": "x",
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": [163585, 163586],
    "ep_size": 1,
    "head_dim": 8,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "unsloth_fixed": True,
    "use_cache": True,
}


def read(folder: Path, fields: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig.from_json(folder / "config.json")


def base(**changes: Any) -> dict[str, Any]:
    return {**small_config().model_dump(mode="json", exclude={"rope_scaling"}), **changes}


DIALECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_mtp_layers": 2}, {"num_nextn_predict_layers": 2}),
    ({"num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": 2}),
    ({"num_mtp_layers": 2, "num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": 2}),
    ({"num_local_experts": 8}, {}),
    ({"q_lora_rank": None}, {"q_lora_rank": None}),
    ({"rope_interleave": True, "qk_head_dim": 18}, {}),
    ({"eos_token_id": 1}, {}),
    (ADDED, {}),
    *(({"model_type": kind, "architectures": ["DeepseekV3ForCausalLM"]}, {}) for kind in ("kimi_k2", "moonlight")),
    ({"architectures": "DeepseekV3ForCausalLM"}, {}),
    ({"architectures": None}, {}),
    ({"architectures": []}, {}),
    (
        {"rope_theta": 50000.0, "rope_scaling": {"type": "yarn", **YARN, **ORIGINAL}},
        {"rope_theta": 50000.0, "rope_scaling": RopeScaling(**YARN, **ORIGINAL)},
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0, **YARN, **ORIGINAL}, "rope_theta": None},
        {"rope_theta": 50000.0, "rope_scaling": RopeScaling(**YARN, **ORIGINAL)},
    ),
    (
        {"rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}, "max_position_embeddings": 8192},
        {
            "max_position_embeddings": 8192,
            "rope_scaling": RopeScaling(**YARN, original_max_position_embeddings=8192),
        },
    ),
    ({"rope_scaling": None, "rope_parameters": None}, {}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 50000}}, {"rope_theta": 50000.0}),
    *(
        ({"quantization_config": quantization}, {})
        for quantization in (
            None,
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
            {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        )
    ),
]


@pytest.mark.parametrize(("written", "changes"), DIALECTS, ids=str)
def test_dialects_of_one_model_are_understood(
    tmp_path: Path, written: dict[str, Any], changes: dict[str, Any]
) -> None:
    fields = {name: value for name, value in base(**written).items() if value is not None or name in written}
    if written.get("rope_theta", 0) is None:
        del fields["rope_theta"]
    if "num_mtp_layers" in written and "num_nextn_predict_layers" not in written:
        del fields["num_nextn_predict_layers"]
    assert read(tmp_path, fields) == small_config(**changes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v2"}, "model_type = deepseek_v2, expected deepseek_v3 or kimi_k2 or moonlight"),
    ({"model_type": "deepseek_v32"}, "model_type = deepseek_v32, expected deepseek_v3"),
    ({"model_type": ["deepseek_v3"]}, "model_type = [deepseek_v3], expected deepseek_v3"),
    ({"model_type": None}, "model_type = null, expected deepseek_v3"),
    ({"architectures": ["DeepseekV2ForCausalLM"]}, "architectures = [DeepseekV2ForCausalLM], expected DeepseekV3"),
    ({"architectures": "GlmMoe"}, "architectures = [GlmMoe], expected DeepseekV3ForCausalLM"),
    ({"scoring_func": "softmax"}, "scoring_func: found softmax: expected sigmoid"),
    ({"topk_method": "greedy"}, "topk_method: found greedy: expected noaux_tc"),
    ({"topk_method": "group_limited_greedy"}, "topk_method: found group_limited_greedy: expected noaux_tc"),
    ({"rope_interleave": False}, "rope_interleave: found false"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: found dynamic: expected yarn"),
    ({"num_mtp_layers": 1, "num_nextn_predict_layers": 2}, "num_mtp_layers = 1, and num_nextn_predict_layers = 2"),
    ({"index_topk": 2048}, "index_topk: unknown field"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "quantization_config with {quant_method: compressed-tensors, fmt: null, weight_block_size: null}, expected "
        "{quant_method: fp8, fmt: e4m3, weight_block_size: [128, 128]}",
    ),
    ({"quantization_config": {"weight_block_size": [1, 128]}}, "weight_block_size: [1, 128]}, expected"),
    ({"quantization_config": "gptq"}, "quant_method: gptq"),
]


@pytest.mark.parametrize(("written", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_other_models_are_refused_by_name(tmp_path: Path, written: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, base(**written))
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1

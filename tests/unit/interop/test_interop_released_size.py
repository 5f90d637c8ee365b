"""The names and shapes of the released models, of full size and without weights.

The numbers are those of the published config.json; the names follow from the rules of the release, which are
written down here a second time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface.import_weights import ReleasedWeights
from deepseek_v3.interop.huggingface.tensor_source import CPU, TensorSource
from deepseek_v3.utils.checkpointing.checks import TensorInfo
from deepseek_v3.utils.errors import CheckpointError

Shape = tuple[int, ...]

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
}
MOONLIGHT = {
    **DEEPSEEK_V3,
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "routed_scaling_factor": 2.446,
    "max_position_embeddings": 8192,
    "rope_theta": 50000.0,
}


def feed_forward(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def in_fp8(c: dict[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    """The matrices of a layer that the release has in FP8."""
    at, hidden, heads = f"model.layers.{layer}.self_attn", c["hidden_size"], c["num_attention_heads"]
    queries = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    if c["q_lora_rank"] is None:
        yield f"{at}.q_proj.weight", (queries, hidden)
    else:
        yield f"{at}.q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield f"{at}.q_b_proj.weight", (queries, c["q_lora_rank"])
    yield f"{at}.kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
    yield f"{at}.kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
    yield f"{at}.o_proj.weight", (hidden, heads * c["v_head_dim"])
    mlp, width = f"model.layers.{layer}.mlp", c["moe_intermediate_size"]
    if layer < c["first_k_dense_replace"]:
        yield from feed_forward(mlp, hidden, c["intermediate_size"])
        return
    for expert in range(c["n_routed_experts"]):
        yield from feed_forward(f"{mlp}.experts.{expert}", hidden, width)
    yield from feed_forward(f"{mlp}.shared_experts", hidden, width * c["n_shared_experts"])


def in_bfloat16(c: dict[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    at, hidden = f"model.layers.{layer}", c["hidden_size"]
    yield f"{at}.input_layernorm.weight", (hidden,)
    yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield f"{at}.self_attn.kv_a_layernorm.weight", (c["kv_lora_rank"],)
    if c["q_lora_rank"] is not None:
        yield f"{at}.self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
    if layer >= c["first_k_dense_replace"]:
        yield f"{at}.mlp.gate.weight", (c["n_routed_experts"], hidden)
    if layer >= c["num_hidden_layers"]:
        yield f"{at}.embed_tokens.weight", (c["vocab_size"], hidden)
        yield f"{at}.enorm.weight", (hidden,)
        yield f"{at}.hnorm.weight", (hidden,)
        yield f"{at}.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{at}.shared_head.norm.weight", (hidden,)
        yield f"{at}.shared_head.head.weight", (c["vocab_size"], hidden)


def released(c: dict[str, Any], quantized: bool) -> dict[str, TensorInfo]:
    """Every tensor of a release."""
    infos = {
        "model.embed_tokens.weight": TensorInfo(torch.bfloat16, (c["vocab_size"], c["hidden_size"])),
        "model.norm.weight": TensorInfo(torch.bfloat16, (c["hidden_size"],)),
        "lm_head.weight": TensorInfo(torch.bfloat16, (c["vocab_size"], c["hidden_size"])),
    }
    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        infos |= {name: TensorInfo(torch.bfloat16, shape) for name, shape in in_bfloat16(c, layer)}
        if layer >= c["first_k_dense_replace"]:
            bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            infos[bias] = TensorInfo(torch.float32, (c["n_routed_experts"],))
        for name, (rows, columns) in in_fp8(c, layer):
            infos[name] = TensorInfo(torch.float8_e4m3fn if quantized else torch.bfloat16, (rows, columns))
            if quantized:
                scales = (-(-rows // 128), -(-columns // 128))
                infos[f"{name}_scale_inv"] = TensorInfo(torch.float32, scales)
    return infos


class OnlyHeaders(TensorSource):
    """Tensors with types and shapes and no values."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.name, self.tensors = "headers", infos

    def read(self, tensor: str, rows: range | None = None, device: torch.device = CPU) -> Tensor:
        raise AssertionError(f"{tensor} {rows} {device}: was read")


def config_of(fields: dict[str, Any], folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig.from_json(folder / "config.json")


# The parameters of each model, without the copies of embedding and head in MTP layers; those of DeepSeek-V3 are 671
# billion of the main model and 11.5 billion of the MTP layer.
@pytest.mark.parametrize(
    ("fields", "quantized", "tensors", "billions"),
    [(DEEPSEEK_V3, True, 91991, 682.5), (MOONLIGHT, False, None, 15.96)],
    ids=["DeepSeek-V3", "Moonlight"],
)
def test_every_released_tensor_has_its_place_and_shape(
    tmp_path: Path, fields: dict[str, Any], quantized: bool, tensors: int | None, billions: float
) -> None:
    config, infos = config_of(fields, tmp_path), released(fields, quantized)
    weights = ReleasedWeights(OnlyHeaders(infos), config, compare_copies=False)
    assert weights.config == config
    found = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    assert found / 1e9 == pytest.approx(billions, rel=1e-3)
    copies = {name for name in infos if name.endswith(("61.embed_tokens.weight", "61.shared_head.head.weight"))}
    own = [info for name, info in infos.items() if not name.endswith("_scale_inv") and name not in copies]
    assert sum(torch.Size(info.shape).numel() for info in own) == found
    if tensors is not None:
        assert len(infos) == tensors


def test_one_error_names_all_that_is_wrong_at_full_size(tmp_path: Path) -> None:
    config, infos = config_of(DEEPSEEK_V3, tmp_path), released(DEEPSEEK_V3, True)
    expert = "model.layers.60.mlp.experts.255.down_proj.weight"
    infos |= {"extra": TensorInfo(torch.float32, (1,)), expert: TensorInfo(torch.float8_e4m3fn, (2048, 7168))}
    del infos["model.layers.61.eh_proj.weight"], infos["model.layers.0.mlp.up_proj.weight_scale_inv"]
    with pytest.raises(CheckpointError) as refusal:
        ReleasedWeights(OnlyHeaders(infos), config, compare_copies=False)
    for problem in (
        "1 missing: model.layers.61.eh_proj.weight",
        "1 unexpected: extra",
        f"{expert}: found shape (2048, 7168), expected (7168, 2048)",
        "model.layers.0.mlp.up_proj.weight: is in FP8 without model.layers.0.mlp.up_proj.weight_scale_inv",
    ):
        assert problem in str(refusal.value)

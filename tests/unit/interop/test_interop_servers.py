"""Every tensor of an export fills its place in the loaders of vLLM, SGLang and llama.cpp, and none stays empty."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.data.tokens.tiktoken_encoder import DEEPSEEK
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import save_pretrained
from helpers.models import YARN, small_config, small_model
from helpers.released_shapes import stored_weights
from helpers.serving_loaders import (
    SERVERS,
    Placing,
    Slot,
    main_slots,
    place_in_main,
    place_in_sglang_draft,
    place_in_vllm_draft,
    sglang_draft_slots,
    vllm_draft_slots,
)

SHAPES: dict[str, dict[str, Any]] = {
    "one MTP layer": {"num_nextn_predict_layers": 1},
    "two MTP layers": {"num_nextn_predict_layers": 2},
    "no MTP layer, queries not compressed": {"q_lora_rank": None},
    "tied, one MTP layer": {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
    "two shared experts": {"n_shared_experts": 2, "num_nextn_predict_layers": 1},
}
# The servers refuse FP8 whose blocks cross the parts of a fused matrix: these widths are multiples of 128.
ALIGNED = {"q_lora_rank": 128, "intermediate_size": 256, "moe_intermediate_size": 128}


def exported(folder: Path, config: ModelConfig, quantization: str | None = None) -> dict[str, Tensor]:
    tokenizer = Tokenizer.train(["to be or not to be"], 260)
    model = small_model(config)
    save_pretrained(model, folder, tokenizer=tokenizer, dtype=torch.bfloat16, quantization=quantization)  # type: ignore[arg-type]
    return stored_weights(folder)


@pytest.fixture(params=[None, "fp8"], ids=["bf16", "fp8"])
def quantization(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


def check_filled(tensors: dict[str, Tensor], place: Placing, slots: dict[str, Slot], quantized: bool) -> None:
    """Every parameter is filled by tensors that together have its shape, and every placed tensor fills one."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (target := place(name)) is not None:
            assert target.part not in found[target.parameter], f"{target} is filled twice"
            found[target.parameter][target.part] = tensor
    expected = {name: (slot, slot.shape()) for name, slot in slots.items()}
    if quantized:
        scales = {f"{name}_scale_inv": (slot, slot.shape(128)) for name, slot in slots.items() if slot.quantized}
        expected |= scales
    assert found.keys() == expected.keys()
    for name, (slot, shape) in expected.items():
        assert joined_shape(found[name], slot) == shape, name
        assert {part.dtype for part in found[name].values()} == {dtype_of(name, slot, quantized)}, name


def joined_shape(parts: dict[str, Tensor], slot: Slot) -> tuple[int, ...]:
    """The shape of the parts, one below the other; of a stack, if every expert has as many."""
    if slot.experts is None:
        assert len(parts) == len(slot.rows)
        return tuple(torch.cat([part.float() for part in parts.values()]).shape)
    of_expert: dict[str, list[Tensor]] = defaultdict(list)
    for part, tensor in parts.items():
        of_expert[part.split(".")[0]].append(tensor.float())
    assert Counter(map(len, of_expert.values())) == {len(slot.rows): slot.experts}
    return tuple(torch.stack([torch.cat(tensors) for tensors in of_expert.values()]).shape)


def dtype_of(name: str, slot: Slot, quantized: bool) -> torch.dtype:
    if name.endswith(("_scale_inv", "e_score_correction_bias")):
        return torch.float32
    return torch.float8_e4m3fn if quantized and slot.quantized else torch.bfloat16


def config_of(changes: dict[str, Any], quantization: str | None) -> ModelConfig:
    aligned = ALIGNED if quantization else {}
    return small_config(**{"vocab_size": 260, **aligned, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_servers_find_every_tensor(tmp_path: Path, shape: str, quantization: str | None) -> None:
    config = config_of(SHAPES[shape], quantization)
    tensors = exported(tmp_path / "hf", config, quantization)
    for server in SERVERS.values():
        if server.shared_is_routed and config.n_shared_experts != 1:
            continue
        slots = main_slots(server, config)
        check_filled(
            tensors, lambda name, s=server: place_in_main(s, config, name), slots, quantization is not None
        )


@pytest.mark.parametrize(
    "shape", [name for name, changes in SHAPES.items() if "num_nextn_predict_layers" in changes]
)
def test_draft_models_find_every_mtp_tensor(tmp_path: Path, shape: str, quantization: str | None) -> None:
    config = config_of(SHAPES[shape], quantization)
    tensors, quantized = exported(tmp_path / "hf", config, quantization), quantization is not None
    check_filled(tensors, lambda name: place_in_vllm_draft(config, name), vllm_draft_slots(config), quantized)
    if config.num_nextn_predict_layers == 1:  # all that SGLang drafts with
        check_filled(
            tensors, lambda name: place_in_sglang_draft(config, name), sglang_draft_slots(config), quantized
        )


# The names of llama.cpp's tensors; those of a layer follow `blk.N.`. `kv_b_proj` becomes two, experts are stacked.
# Read in the llama.cpp sources of llama-cpp-python 0.3.36: conversion/deepseek.py, src/models/deepseek2.cpp.
GGUF = {
    "model.embed_tokens.weight": ["token_embd.weight"],
    "model.norm.weight": ["output_norm.weight"],
    "lm_head.weight": ["output.weight"],
    "input_layernorm.weight": ["attn_norm.weight"],
    "post_attention_layernorm.weight": ["ffn_norm.weight"],
    "self_attn.q_proj.weight": ["attn_q.weight"],
    "self_attn.q_a_proj.weight": ["attn_q_a.weight"],
    "self_attn.q_a_layernorm.weight": ["attn_q_a_norm.weight"],
    "self_attn.q_b_proj.weight": ["attn_q_b.weight"],
    "self_attn.kv_a_proj_with_mqa.weight": ["attn_kv_a_mqa.weight"],
    "self_attn.kv_a_layernorm.weight": ["attn_kv_a_norm.weight"],
    "self_attn.kv_b_proj.weight": ["attn_k_b.weight", "attn_v_b.weight"],
    "self_attn.o_proj.weight": ["attn_output.weight"],
    "mlp.gate_proj.weight": ["ffn_gate.weight"],
    "mlp.up_proj.weight": ["ffn_up.weight"],
    "mlp.down_proj.weight": ["ffn_down.weight"],
    "mlp.gate.weight": ["ffn_gate_inp.weight"],
    "mlp.gate.e_score_correction_bias": ["exp_probs_b.bias"],
    "mlp.experts.gate_proj.weight": ["ffn_gate_exps.weight"],
    "mlp.experts.up_proj.weight": ["ffn_up_exps.weight"],
    "mlp.experts.down_proj.weight": ["ffn_down_exps.weight"],
    "mlp.shared_experts.gate_proj.weight": ["ffn_gate_shexp.weight"],
    "mlp.shared_experts.up_proj.weight": ["ffn_up_shexp.weight"],
    "mlp.shared_experts.down_proj.weight": ["ffn_down_shexp.weight"],
}
ATTENTION = (
    "attn_norm attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm attn_k_b attn_v_b attn_output ffn_norm"
)
DENSE = "ffn_gate ffn_up ffn_down"
SPARSE = "ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps ffn_gate_shexp ffn_up_shexp ffn_down_shexp"


def gguf_names(tensors: dict[str, Tensor], config: ModelConfig) -> Counter[str]:
    """How many tensors become each tensor of llama.cpp. MTP layers and a tied head are left out, FP8 is undone."""
    names: Counter[str] = Counter()
    for name in tensors:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        skipped = name.endswith("_scale_inv") or (config.tie_word_embeddings and name == "lm_head.weight")
        if skipped or (layer is not None and int(layer[1]) >= config.num_hidden_layers):
            continue
        own = re.sub(r"experts\.\d+\.", "experts.", name if layer is None else name[layer.end() :])
        names.update(target if layer is None else f"blk.{layer[1]}.{target}" for target in GGUF[own])
    return names


@pytest.mark.parametrize("shape", [name for name in SHAPES if "not compressed" not in name])
def test_llama_cpp_finds_every_tensor(tmp_path: Path, shape: str, quantization: str | None) -> None:
    config = config_of(SHAPES[shape], quantization)
    names = gguf_names(exported(tmp_path / "hf", config, quantization), config)
    wanted = {"token_embd.weight": 1, "output_norm.weight": 1}
    if not config.tie_word_embeddings:
        wanted["output.weight"] = 1
    for layer in range(config.num_hidden_layers):
        sparse = layer >= config.first_k_dense_replace
        for part in f"{ATTENTION} {SPARSE if sparse else DENSE}".split():
            wanted[f"blk.{layer}.{part}.weight"] = config.n_routed_experts if part.endswith("_exps") else 1
        if sparse:
            wanted[f"blk.{layer}.exp_probs_b.bias"] = 1
    assert names == wanted


# Fields that the loaders read without a default, or with the default of another architecture.
REQUIRED = (
    "first_k_dense_replace hidden_act hidden_size intermediate_size kv_lora_rank max_position_embeddings "
    "moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob "
    "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers "
    "q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps rope_theta routed_scaling_factor scoring_func "
    "tie_word_embeddings topk_group topk_method v_head_dim vocab_size torch_dtype eos_token_id"
).split()


def test_the_config_has_what_the_loaders_read(tmp_path: Path) -> None:
    exported(tmp_path / "hf", config_of({"rope_scaling": YARN}, "fp8"), "fp8")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [name for name in REQUIRED if name not in fields] == []
    assert "use_fp8_kv" not in fields  # which is of this project alone
    # What chooses the class of the main model, and by it that of the draft model; no code of the directory runs.
    assert (fields["model_type"], fields["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    assert "auto_map" not in fields
    # Blocks need scales of activations that are computed while serving.
    quantization = fields["quantization_config"]
    assert (quantization["quant_method"], quantization["activation_scheme"]) == ("fp8", "dynamic")
    assert quantization["weight_block_size"] == [128, 128]
    # The names of old and new loaders; Transformers, vLLM and SGLang read the second form from the first.
    assert fields["rope_scaling"]["type"] == fields["rope_scaling"]["rope_type"] == "yarn"
    rope = AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 10000.0, 4.0)
    assert (rope["mscale"], rope["mscale_all_dim"], rope["original_max_position_embeddings"]) == (1.0, 1.0, 16)


def test_servers_stop_at_the_end_of_a_text(tmp_path: Path) -> None:
    exported(tmp_path / "hf", small_config(vocab_size=260))
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"]
    assert Tokenizer.load(tmp_path / "hf").ends == (ends,)


def test_a_trained_tokenizer_cuts_as_llama_cpps_deepseek_v3_does() -> None:
    """The converter knows tokenizers by the ids of one text, so it must be told that ours is a `deepseek-v3`."""
    numbers, cjk, words = DEEPSEEK
    assert numbers == r"\p{N}{1,3}"
    assert cjk == "[一-龥\u3040-ゟ゠-ヿ]+"
    assert words == (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    )

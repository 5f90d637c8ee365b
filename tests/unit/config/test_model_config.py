"""The shape of a model: released files load unchanged, and contradictions are refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import DeepseekV3Config

from deepseek_v3.config.model_config import ModelConfig, RopeScaling
from deepseek_v3.utils.errors import ConfigError
from helpers.models import YARN, small_config

RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

# Fields of the released file that say nothing about the shape.
WITHOUT_EFFECT = set(
    "architectures auto_map aux_loss_alpha bos_token_id eos_token_id ep_size model_type pretraining_tp "
    "quantization_config seq_aux torch_dtype transformers_version use_cache".split()
)


def write_json(folder: Path, fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def test_the_released_file_loads_as_it_is(tmp_path: Path) -> None:
    config = ModelConfig.from_json(write_json(tmp_path, RELEASED))

    shape = {name: value for name, value in RELEASED.items() if name not in WITHOUT_EFFECT | {"rope_scaling"}}
    assert {name: getattr(config, name) for name in shape} == shape
    assert config.rope_scaling == RopeScaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert config.qk_head_dim == 192
    assert config.num_moe_layers == 58
    assert [layer for layer in range(62) if not config.is_moe_layer(layer)] == [0, 1, 2]


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
def test_a_file_that_transformers_wrote_loads(tmp_path: Path, rope_scaling: RopeScaling | None) -> None:
    config = small_config(rope_scaling=rope_scaling, rope_theta=500.0, num_nextn_predict_layers=2)
    rope: dict[str, Any] = {"rope_theta": 500.0, "rope_type": "default"}
    if rope_scaling is not None:
        rope |= rope_scaling.model_dump()
    ours_alone = {"rope_theta", "rope_scaling", "num_nextn_predict_layers", "num_key_value_heads"}
    theirs = DeepseekV3Config(
        **config.model_dump(exclude=ours_alone),
        num_key_value_heads=config.num_attention_heads,
        num_mtp_layers=2,
        rope_parameters=rope,
    )
    theirs.save_pretrained(tmp_path)

    read = ModelConfig.from_json(tmp_path / "config.json")

    assert read == config.model_copy(update={"num_key_value_heads": config.num_attention_heads})


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1}, "num_experts_per_tok = 9"),
    ({"n_group": 3}, "n_group = 3"),
    ({"topk_group": 5}, "topk_group = 5"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5"),
    ({"n_group": 8, "topk_group": 8}, "n_group = 8"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ({"use_fp8_kv": True}, "use_fp8_kv = true needs a kv_lora_rank that is a multiple of 128, found 16"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4"),
    ({"rope_scaling": {**YARN.model_dump(), "beta_fast": 0.5}}, "beta_fast = 0.5"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"n_routed_experts": -8}, "n_routed_experts"),
    ({"n_shared_experts": -1}, "n_shared_experts"),
    ({"initializer_range": 0.0}, "initializer_range"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"hidden_size": "40 wide"}, "hidden_size"),
    ({"hidden_size": 40.5}, "hidden_size"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"rope_scaling": {**YARN.model_dump(), "rope_type": "linear"}}, "rope_scaling.rope_type: found linear"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {**YARN.model_dump(), "factor": 0.5}}, "rope_scaling.factor"),
    (
        {"rope_scaling": {**YARN.model_dump(), "beta_fats": 32}},
        "rope_scaling.beta_fats: unknown field; did you mean",
    ),
    ({"num_hiden_layers": 3}, "num_hiden_layers: unknown field; did you mean num_hidden_layers?"),
    ({"completely_different": 3}, "completely_different: unknown field; known fields: "),
]


@pytest.mark.parametrize(("changes", "named"), CONTRADICTIONS, ids=[named for _, named in CONTRADICTIONS])
def test_a_contradiction_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    fields = {**small_config().model_dump(mode="json"), **changes}
    path = write_json(tmp_path, fields)

    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_json(path)

    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert named in message
    assert len(message.splitlines()) == 1


FILE_CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"qk_head_dim": 20}, "qk_head_dim = 20"),
    ({"qk_head_dim": "18"}, "qk_head_dim"),
    ({"qk_head_dim": 19, "qk_nope_head_dim": "10"}, "qk_nope_head_dim"),
    ({"qk_head_dim": 18, "qk_nope_head_dim": None}, "qk_nope_head_dim"),
    ({"model_type": "llama"}, "model_type = llama"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    ({"rope_parameters": "yarn"}, "rope_parameters"),
    ({"rope_parameters": 5}, "rope_parameters"),
    ({"rope_scaling": {**YARN.model_dump(), "type": "linear"}}, "rope_scaling"),
]


@pytest.mark.parametrize(
    ("changes", "named"), FILE_CONTRADICTIONS, ids=[str(changes) for changes, _ in FILE_CONTRADICTIONS]
)
def test_values_only_possible_in_files_are_checked(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    fields = {**small_config().model_dump(mode="json", exclude_none=True), **changes}

    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_json(write_json(tmp_path, fields))

    assert named in str(refusal.value)


def as_transformers_reads(fields: dict[str, Any]) -> dict[str, Any]:
    """The file as Transformers reads it, restricted to the fields that both know."""
    theirs = DeepseekV3Config(**fields)
    read = {name: getattr(theirs, name) for name in ModelConfig.model_fields if hasattr(theirs, name)}
    rope = dict(theirs.rope_parameters)
    read["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rope.pop("type", None)
    read["rope_scaling"] = None if kind == "default" else RopeScaling.model_validate(rope, strict=False)
    del read["num_key_value_heads"]  # latent attention does not use it
    return read


ABSENT = ["n_group", "topk_group", "routed_scaling_factor", "q_lora_rank", "rope_theta", "num_nextn_predict_layers"]


@pytest.mark.parametrize("absent", [[name] for name in sorted(RELEASED)] + [ABSENT, sorted(RELEASED)], ids=str)
def test_missing_fields_get_the_defaults_of_transformers(tmp_path: Path, absent: list[str]) -> None:
    fields = {name: value for name, value in RELEASED.items() if name not in absent}
    read = ModelConfig.from_json(write_json(tmp_path, fields))
    expected = as_transformers_reads(fields)
    assert len(expected) > 20
    assert {name: getattr(read, name) for name in expected} == expected
    assert (read.scoring_func, read.topk_method, read.moe_layer_freq) == ("sigmoid", "noaux_tc", 1)


STRETCHED = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": STRETCHED, "rope_theta": 9.0},
        {"rope_parameters": {**STRETCHED, "rope_theta": 7.0}, "max_position_embeddings": 512},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 9.0},
        {"rope_scaling": {**STRETCHED, "rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_scaling": STRETCHED, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": {}, "rope_theta": 9.0},
    ],
    ids=str,
)
def test_rotary_parameters_are_those_that_transformers_reads(tmp_path: Path, rope: dict[str, Any]) -> None:
    read = ModelConfig.from_json(write_json(tmp_path, rope))
    expected = as_transformers_reads(copy.deepcopy(rope))
    assert (read.rope_theta, read.rope_scaling) == (expected["rope_theta"], expected["rope_scaling"])


def test_a_problem_with_a_field_that_is_not_in_the_file_says_so(tmp_path: Path) -> None:
    fields = small_config().model_dump(mode="json", exclude={"n_group", "topk_group"})
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_json(write_json(tmp_path, fields))
    assert "n_group = 8 leaves 1 expert per group" in str(refusal.value)
    assert str(refusal.value).endswith("(not in the file, so as in Transformers: n_group = 8)")


def test_every_problem_has_its_own_line(tmp_path: Path) -> None:
    fields = {**small_config().model_dump(mode="json"), "hidden_size": "wide", "vocab_size": -1}

    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_json(write_json(tmp_path, fields))

    lines = str(refusal.value).splitlines()
    assert len(lines) == 2
    assert "vocab_size: found -1" in lines[0]
    assert "hidden_size: found wide" in lines[1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is in UTF-16"),
        (b"{}\xff", ":1: is not UTF-8"),
        (b"[1]", "expected an object of fields"),
    ],
)
def test_a_file_that_holds_no_fields_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=expected):
        ModelConfig.from_json(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read: No such file"):
        ModelConfig.from_json(tmp_path / "absent.json")


def test_a_config_cannot_be_changed() -> None:
    config = small_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.hidden_size = 8
    with pytest.raises(ValidationError, match="frozen"):
        YARN.factor = 8.0


def test_layers_are_dense_first() -> None:
    config = small_config(num_hidden_layers=3, first_k_dense_replace=2, num_nextn_predict_layers=1)
    assert [config.is_moe_layer(layer) for layer in range(4)] == [False, False, True, True]
    assert config.num_moe_layers == 1

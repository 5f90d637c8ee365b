"""Import and export of weights by released name; an import that fails changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface import load_released, released_state, to_released_names
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import CheckpointError
from helpers.models import largest_difference, random_tokens, small_config, small_model
from helpers.transformers_reference import transformers_config, transformers_model

COPIES = {
    "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.3.shared_head.head.weight": "lm_head.weight",
}


def expected_names(config: ModelConfig) -> set[str]:
    """The released names of an untied model with one MTP layer."""
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj".split()
    projections = "gate_proj up_proj down_proj".split()
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(4):
        own = {f"self_attn.{part}.weight" for part in attention}
        own |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
        if layer < config.first_k_dense_replace:
            own |= {f"mlp.{projection}.weight" for projection in projections}
        else:
            experts = [f"experts.{e}" for e in range(config.n_routed_experts)]
            networks = [*experts, "shared_experts"]
            own |= {f"mlp.{network}.{projection}.weight" for network in networks for projection in projections}
            own |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
        names |= {f"model.layers.{layer}.{name}" for name in own}
    prediction = "enorm hnorm eh_proj embed_tokens shared_head.norm shared_head.head".split()
    return names | {f"model.layers.3.{part}.weight" for part in prediction}


def same_state(one: DeepSeekV3, other: DeepSeekV3) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def config() -> ModelConfig:
    return small_config(num_nextn_predict_layers=1)


@pytest.fixture
def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Released weights of some model."""
    return {name: tensor.clone() for name, tensor in released_state(small_model(config)).items()}


def test_names_are_the_released_ones(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    assert set(weights) == expected_names(config)


def test_experts_are_unstacked(config: ModelConfig) -> None:
    model = small_model(config)
    weights = released_state(model)
    width = config.moe_intermediate_size
    for layer in (1, 2, 3):
        stacked = model.model.layers[layer].mlp.experts
        for e in range(config.n_routed_experts):
            expert = f"model.layers.{layer}.mlp.experts.{e}"
            assert torch.equal(weights[f"{expert}.gate_proj.weight"], stacked.gate_up_proj[e, :width])
            assert torch.equal(weights[f"{expert}.up_proj.weight"], stacked.gate_up_proj[e, width:])
            assert torch.equal(weights[f"{expert}.down_proj.weight"], stacked.down_proj[e])


def test_an_mtp_layer_repeats_embedding_and_head(weights: dict[str, Tensor]) -> None:
    for copy, original in COPIES.items():
        assert torch.equal(weights[copy], weights[original])


def test_released_weights_need_no_gradient(config: ModelConfig) -> None:
    assert not any(tensor.requires_grad for tensor in released_state(small_model(config)).values())


def test_gradients_are_renamed_like_weights(config: ModelConfig) -> None:
    tensors = dict(small_model(config).named_parameters())
    renamed = to_released_names(config, tensors)
    biases = {name for name in expected_names(config) if name.endswith("e_score_correction_bias")}
    assert set(renamed) == expected_names(config) - biases


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 2},
        {"q_lora_rank": None},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "n_shared_experts": 0},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_export_and_import_change_nothing(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    first, second = small_model(config), small_model(config)
    assert not same_state(first, second)
    load_released(second, released_state(first))
    assert same_state(first, second)


def test_values_are_converted_to_the_models_type(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    model = small_model(config)
    load_released(model, {name: tensor.bfloat16() for name, tensor in weights.items()})
    for name, tensor in released_state(model).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].bfloat16().float())


def test_shared_copies_may_be_missing(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    whole, without = small_model(config), small_model(config)
    load_released(whole, weights)
    load_released(without, {name: tensor for name, tensor in weights.items() if name not in COPIES})
    assert same_state(whole, without)


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(weights: dict[str, Tensor]) -> None:
        for name in names:
            del weights[name]

    return damage


def with_other(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: tensor})


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
DAMAGES: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (without(EXPERT), f"1 missing: {EXPERT}"),
    (without("model.norm.weight"), "1 missing: model.norm.weight"),
    (without("lm_head.weight"), "1 missing: lm_head.weight"),
    (
        without(*(f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(5))),
        "5 missing: model.layers.2.mlp.experts.0.down_proj.weight, model.layers.2.mlp.experts.1.down_proj.weight, "
        "model.layers.2.mlp.experts.2.down_proj.weight, …",
    ),
    (with_other(f"{EXPERT}_scale_inv", torch.ones(1)), f"1 unexpected: {EXPERT}_scale_inv"),
    (with_other("model.layers.4.eh_proj.weight", torch.ones(1)), "1 unexpected: model.layers.4.eh_proj.weight"),
    (with_other("model.layers.1.mlp.experts.gate_up_proj", torch.ones(1)), "1 unexpected"),
    (
        with_other("model.norm.weight", torch.ones(41)),
        "model.norm.weight: found shape (41,), expected (40,)",
    ),
    (with_other(EXPERT, torch.ones(40, 20)), f"{EXPERT}: found shape (40, 20), expected (20, 40)"),
    *(
        (with_other(copy, torch.ones(97, 40)), f"{copy} differs from {original}")
        for copy, original in COPIES.items()
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    config: ModelConfig,
    weights: dict[str, Tensor],
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    model = small_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(weights)

    with pytest.raises(CheckpointError) as refusal:
        load_released(model, weights)

    assert message in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_error_names_all_problems(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    del weights["model.norm.weight"]
    weights["extra"] = torch.ones(1)
    weights["lm_head.weight"] = torch.ones(97, 41)
    weights[EXPERT] = torch.ones(20, 40, dtype=torch.int8)
    weights["model.embed_tokens.weight"] = torch.ones(97, 40, device="meta")
    with pytest.raises(CheckpointError) as refusal:
        load_released(small_model(config), weights)
    message = str(refusal.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: extra" in message
    assert "lm_head.weight: found shape (97, 41), expected (97, 40)" in message
    assert f"{EXPERT}: found type int8, expected bfloat16, float16, float32, float64, or float8_e4m3fn" in message
    assert "model.embed_tokens.weight: has a shape but no values (device meta)" in message


def test_a_model_on_the_meta_device_gets_memory(config: ModelConfig) -> None:
    source = small_model(config)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    load_released(model, released_state(source))
    assert same_state(model, source)


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2}, {"tie_word_embeddings": True}], ids=str)
def test_safetensors_saves_what_is_released(tmp_path: Path, changes: dict[str, object]) -> None:
    model = small_model(small_config(**{"num_nextn_predict_layers": 1, **changes}))
    save_file(released_state(model), tmp_path / "model.safetensors")
    other = small_model(model.config)
    load_released(other, load_file(tmp_path / "model.safetensors"))
    assert same_state(other, model)


@pytest.mark.parametrize(("depth", "held"), [(1, 0), (2, 1), (2, 0)])
@torch.no_grad()
def test_missing_mtp_layers_are_removed(caplog: pytest.LogCaptureFixture, depth: int, held: int) -> None:
    source = small_model(small_config(num_nextn_predict_layers=held))
    model = small_model(small_config(num_nextn_predict_layers=depth))
    load_released(model, released_state(source))
    assert same_state(model, source)
    assert model.config == source.config
    warning = f"hold {held} of the {depth} MTP layers of the config and nothing of model.layers.{3 + held}"
    assert warning in caplog.text
    tokens_BS = random_tokens(source.config, 1, 6)
    assert len(model.hidden_states(tokens_BS).mtp) == held
    assert torch.equal(model(tokens_BS), source(tokens_BS))


def test_an_incomplete_mtp_layer_is_refused(weights: dict[str, Tensor]) -> None:
    model = small_model(small_config(num_nextn_predict_layers=1))
    del weights["model.layers.3.eh_proj.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.3\.eh_proj\.weight"):
        load_released(model, weights)


def in_fp8(config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights with one matrix in FP8, whose last blocks are smaller, and the same weights dequantized."""
    weights = {name: tensor.clone() for name, tensor in released_state(small_model(config)).items()}
    quantized = torch.randn(300, 140).to(torch.float8_e4m3fn)
    scales = 0.01 * (1 + torch.rand(3, 2))
    values = quantized.float()
    for row in range(3):
        for column in range(2):
            values[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= scales[row, column]
    name = "model.layers.0.mlp.up_proj.weight"
    return weights | {name: quantized, f"{name}_scale_inv": scales}, weights | {name: values}


WIDE = {"hidden_size": 140, "intermediate_size": 300}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_multiplied_by_their_scales(dtype: torch.dtype) -> None:
    config = small_config(**WIDE)
    weights, values = in_fp8(config)
    found, expected = small_model(config, dtype), small_model(config, dtype)
    load_released(found, weights)
    load_released(expected, values)
    assert same_state(found, expected)


FP8_DAMAGES: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (without(f"{UP}_scale_inv"), f"{UP}: is in FP8 without {UP}_scale_inv, expected its scales"),
    (with_other(f"{UP}_scale_inv", torch.ones(2, 3)), f"{UP}_scale_inv: found shape (2, 3), expected (3, 2)"),
    (with_other(f"{UP}_scale_inv", torch.ones(())), f"{UP}_scale_inv: found shape (), expected (3, 2)"),
    (with_other(f"{UP}_scale_inv", torch.ones(3, 2).int()), f"{UP}_scale_inv: found type int32"),
    (with_other(UP, torch.ones(300, 140).to(torch.float8_e5m2)), f"{UP}: found type float8_e5m2"),
    (
        with_other("model.norm.weight", torch.ones(140).to(torch.float8_e4m3fn)),
        "model.norm.weight: found type float8_e4m3fn and shape (140,), expected FP8 for matrices only",
    ),
]


@pytest.mark.parametrize(("damage", "message"), FP8_DAMAGES, ids=[message for _, message in FP8_DAMAGES])
def test_fp8_that_cannot_be_read_is_refused(damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    config = small_config(**WIDE)
    weights, _ = in_fp8(config)
    damage(weights)
    with pytest.raises(CheckpointError) as refusal:
        load_released(small_model(config), weights)
    assert message in str(refusal.value)


@torch.no_grad()
def test_a_transformers_folder_without_its_mtp_layers_loads(tmp_path: Path) -> None:
    config = small_config(num_nextn_predict_layers=1)
    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path)
    read = ModelConfig.from_json(tmp_path / "config.json")
    assert read.num_nextn_predict_layers == 1
    ours = DeepSeekV3(read)
    load_released(ours, load_file(tmp_path / "model.safetensors"))
    tokens_BS = random_tokens(config, 2, 9)
    assert largest_difference(ours(tokens_BS), theirs(tokens_BS).logits) < 1e-4


def test_a_tied_head_is_a_copy_of_the_embedding() -> None:
    config = small_config(tie_word_embeddings=True)
    weights = released_state(small_model(config))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_tied_model_takes_a_head_only_if_it_is_the_embedding() -> None:
    config = small_config(tie_word_embeddings=True)
    weights = {name: t for name, t in released_state(small_model(config)).items() if name != "lm_head.weight"}
    model = small_model(config)
    load_released(model, weights)
    load_released(model, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_released(model, weights | {"lm_head.weight": torch.ones(97, 40)})


def test_the_gradients_of_a_tied_model_have_no_head() -> None:
    """The gradient of a shared matrix is one, however many names its weights have."""
    config = small_config(tie_word_embeddings=True)
    assert "lm_head.weight" not in to_released_names(config, dict(small_model(config).named_parameters()))
    assert "lm_head.weight" in released_state(small_model(config))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_loads_here(tmp_path: Path, tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path)

    ours = DeepSeekV3(ModelConfig.from_json(tmp_path / "config.json"))
    load_released(ours, load_file(tmp_path / "model.safetensors"))

    tokens_BS = random_tokens(config, 2, 9)
    assert largest_difference(ours(tokens_BS), theirs(tokens_BS).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_here_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    ours = small_model(config)
    save_file(released_state(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers_config(config).save_pretrained(tmp_path)

    theirs, report = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_BS = random_tokens(config, 2, 9)
    assert largest_difference(ours(tokens_BS), theirs(tokens_BS).logits) < 1e-4

"""Counts from a config against the module that it builds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.planning.counts import count_active_parameters, count_parameters, training_flops_per_token
from deepseek_v3.planning.hardware import peak_bfloat16_flops
from helpers import small_config

CONFIGS = Path(__file__).parents[2] / "configs"


def _built(config: ModelConfig) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(config)


@given(
    layers=st.integers(1, 4),
    dense=st.integers(0, 4),
    experts=st.integers(2, 9),
    shared=st.integers(0, 3),
    depth=st.integers(0, 2),
    q_rank=st.none() | st.integers(1, 20),
    tied=st.booleans(),
)
def test_counts_equal_the_built_module(
    layers: int, dense: int, experts: int, shared: int, depth: int, q_rank: int | None, tied: bool
) -> None:
    config = small_config(
        num_hidden_layers=layers,
        first_k_dense_replace=min(dense, layers),
        n_routed_experts=experts,
        num_experts_per_tok=min(2, experts),
        n_group=1,
        topk_group=1,
        n_shared_experts=shared,
        num_nextn_predict_layers=depth,
        q_lora_rank=q_rank,
        tie_word_embeddings=tied,
    )
    counts, model = count_parameters(config), _built(config)
    assert counts.with_prediction == sum(p.numel() for p in model.parameters())
    prediction = sum(p.numel() for layer in model.model.layers[layers:] for p in layer.parameters())
    assert counts.prediction == prediction
    assert counts.total == counts.with_prediction - prediction


def test_the_published_model_has_its_published_numbers() -> None:
    config = load_config(CONFIGS / "deepseek_v3_base.yaml").model
    assert round(count_parameters(config).total / 1e9, 2) == 671.03
    assert round(count_active_parameters(config) / 1e9, 1) == 36.6


def test_active_parameters_are_those_that_one_token_multiplies_with() -> None:
    config = small_config()
    model = _built(config)
    active = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if ".mlp.experts." in name else 1
        active += round(parameter.numel() * share)
    assert count_active_parameters(config) == active


def test_flops_are_six_per_active_matrix_weight_and_causal_score() -> None:
    config = small_config(num_nextn_predict_layers=1)
    model, length = _built(config), 10
    weights = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed_tokens" not in name:
            share = config.num_experts_per_tok / config.n_routed_experts if ".mlp.experts." in name else 1
            uses = 2 if name == "lm_head.weight" else 1  # once for the next token, once for the one after
            weights += parameter.numel() * share * uses
    layers = config.num_hidden_layers + 1
    scores = layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * length / 2
    assert training_flops_per_token(config, length) == pytest.approx(6 * (weights + scores))


def test_peak_rates_are_found_by_the_card_in_the_device_name() -> None:
    assert peak_bfloat16_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_bfloat16_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_bfloat16_flops("a card nobody has heard of") is None

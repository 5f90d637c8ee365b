"""Parameter counts compared with the built module, and operations compared with those that torch counts."""

import re
from collections import Counter
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.attention import reference_attention
from deepseek_v3.planning.counts import (
    active_conventions,
    count_active_parameters,
    count_active_parts,
    count_layers,
    count_parameters,
)
from deepseek_v3.planning.flops import (
    flops_per_token,
    forward_flops,
    mtp_forward_flops,
    training_flops_per_token,
)
from helpers import ROOT
from helpers.models import random_tokens, small_config, small_model

CONFIGS = sorted((ROOT / "configs").glob("deepseek_v3_*.yaml"))

# The part of each parameter of the main model, by the first pattern in its name.
PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "norm": "norms",
    "self_attn": "attention",
    r"mlp\.experts": "routed_experts",
    r"mlp\.shared_experts": "shared_experts",
    r"mlp\.gate\.": "gates",
    r"mlp\.(gate|up|down)_proj": "dense_ffn",
}


@lru_cache(maxsize=1)
def _built(config: ModelConfig) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(config)


def _part(name: str, config: ModelConfig) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "prediction"
    return next(part for pattern, part in PARTS.items() if re.search(pattern, name))


def _counted(config: ModelConfig) -> dict[str, int]:
    """Parameters of the built module by part."""
    counts = dict.fromkeys([*PARTS.values(), "prediction"], 0)
    for name, parameter in _built(config).named_parameters():
        counts[_part(name, config)] += parameter.numel()
    return counts


def _counted_active(config: ModelConfig) -> dict[str, int]:
    """Parameters of the built module that one token is multiplied with, by part."""
    counts = dict.fromkeys([*PARTS.values(), "prediction"], 0)
    model = _built(config)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            counts[_part(name, config)] += config.num_experts_per_tok * parameter[0].numel()
        elif "embed_tokens" not in name and "lm_head" not in name:
            counts[_part(name, config)] += parameter.numel()
    counts["head"] = model.head_weight_VD.numel()
    return counts


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any valid shape of few layers."""
    layers, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = groups * draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * experts // groups)),
        "n_shared_experts": draw(st.integers(0, 3)),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "q_lora_rank": draw(st.none() | st.integers(1, 20)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 6)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    widths = "vocab_size hidden_size intermediate_size num_attention_heads kv_lora_rank qk_nope_head_dim v_head_dim"
    changes |= {name: draw(st.integers(1, 40)) for name in [*widths.split(), "moe_intermediate_size"]}
    return small_config(**changes)


@given(configs())
def test_counts_equal_the_built_module(config: ModelConfig) -> None:
    counts = count_parameters(config)
    assert asdict(counts) == _counted(config)
    assert counts.with_prediction == sum(parameter.numel() for parameter in _built(config).parameters())
    assert counts.total == counts.with_prediction - counts.prediction


@given(configs())
def test_active_counts_equal_multiplied_weights(config: ModelConfig) -> None:
    active = count_active_parts(config)
    assert asdict(active) == _counted_active(config)
    assert count_active_parameters(config) == active.total


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_counts_equal_the_built_module_of_every_shipped_config(path: Path) -> None:
    config = load_config(path).model
    assert asdict(count_parameters(config)) == _counted(config)
    assert asdict(count_active_parts(config)) == _counted_active(config)


@given(configs())
def test_the_layers_of_a_model_are_the_sum_of_its_stages(config: ModelConfig) -> None:
    experts, dense = config.n_routed_experts, config.first_k_dense_replace
    stages = [count_layers(config, 1, 0, experts)] * dense
    stages += [count_layers(config, 0, 1, experts)] * config.num_moe_layers
    whole = asdict(count_layers(config, dense, config.num_moe_layers, experts))
    assert whole == {part: sum(asdict(stage)[part] for stage in stages) for part in whole}


def test_the_published_model_has_its_published_numbers() -> None:
    config = load_config(CONFIGS[0].with_name("deepseek_v3_base.yaml")).model
    assert round(count_parameters(config).total / 1e9, 2) == 671.03
    assert {name: round(count / 1e9, 2) for name, count in active_conventions(config).items()} == {
        "with_head": 36.63,
        "with_head_and_embedding": 37.55,
        "without_head_or_embedding": 35.70,
        "with_head_and_prediction": 37.31,
    }


def test_a_tied_matrix_is_active_once() -> None:
    tied = active_conventions(small_config(tie_word_embeddings=True))
    untied = active_conventions(small_config(tie_word_embeddings=False))
    assert tied["with_head_and_embedding"] == tied["with_head"] == untied["with_head"]
    assert untied["with_head_and_embedding"] == untied["with_head"] + 97 * 40


def _run_forward(model: DeepSeekV3, tokens_BS: Tensor) -> Tensor:
    states = model.hidden_states(tokens_BS)
    return torch.stack([model.logits(hidden).sum() for hidden in (states.main_BSD, *states.mtp)]).sum()


def _products(model: DeepSeekV3, tokens_BS: Tensor, backward: bool) -> Counter[str]:
    """Operations that torch counts: in products with weights, and in attention, whose products are batched."""
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        output = _run_forward(model, tokens_BS)
        if backward:
            output.backward()
    found: Counter[str] = Counter()
    for operation, flops in counter.get_flop_counts()["Global"].items():
        found["attention" if "bmm" in str(operation) else "weights"] += flops
    return found


def _expected_products(config: ModelConfig, length: int) -> Counter[str]:
    """Planned operations of one sequence, with full attention, and depth 1 on all tokens but the last."""
    found: Counter[str] = Counter()
    for parts, tokens in (
        (forward_flops(config, length), length),
        (mtp_forward_flops(config, length - 1), length - 1),
    ):
        found["attention"] += 2 * tokens * parts.attention_scores
        found["weights"] += tokens * (parts.total - parts.attention_scores)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_nextn_predict_layers": 1},
        {"num_nextn_predict_layers": 1, "q_lora_rank": None, "n_shared_experts": 2},
    ],
    ids=["plain", "prediction", "prediction, no query rank, two shared experts"],
)
def test_operations_equal_the_counts_of_torch(changes: dict[str, Any]) -> None:
    config, length = small_config(**changes), 12
    model, tokens_BS = small_model(config), random_tokens(config, 1, length)
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.attend = reference_attention
    expected = _expected_products(config, length)
    assert _products(model, tokens_BS, backward=False) == expected
    assert _products(model, tokens_BS, backward=True) == {part: 3 * flops for part, flops in expected.items()}


def test_recomputation_repeats_every_layer_and_not_the_head() -> None:
    config, length = small_config(), 12
    model, tokens_BS = small_model(config), random_tokens(config, 1, length)
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.attend = reference_attention
    kept = _products(model, tokens_BS, backward=True)
    model.run_layer = partial(checkpoint, use_reentrant=False)
    found = _products(model, tokens_BS, backward=True)
    ours = flops_per_token(config, length, "full")
    assert found["weights"] - kept["weights"] + (found["attention"] - kept["attention"]) / 2 == (
        length * ours.recomputation
    )
    assert found["attention"] == 2 * length * ours.attention


@given(configs(), st.integers(2, 50))
def test_step_counts_add_up(config: ModelConfig, length: int) -> None:
    main, prediction = forward_flops(config, length), mtp_forward_flops(config, length)
    none, full = flops_per_token(config, length), flops_per_token(config, length, "full")
    assert none.forward == full.forward == main.total + prediction.total
    assert none.total == 3 * none.forward == training_flops_per_token(config, length)
    assert none.recomputation == 0
    assert full.total == none.total + full.forward - main.head - prediction.head
    assert full.attention * 3 == none.attention * 4
    scores = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert main.attention_scores == scores * length
    assert main.joining == 0


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


def test_flops_of_the_published_model() -> None:
    config = load_config(CONFIGS[0].with_name("deepseek_v3_base.yaml")).model
    assert round(training_flops_per_token(config, 4096) / 1e9, 1) == 260.6
    without = config.model_copy(update={"num_nextn_predict_layers": 0})
    assert round(training_flops_per_token(without, 4096) / 1e9, 1) == 250.4

"""Logits, loss and every gradient against Transformers' DeepSeek-V3 with the same weights, in float32.

Run with `-s` to print the largest differences as a table.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface import load_released, to_released_names
from deepseek_v3.model.transformer import DeepSeekV3
from helpers.models import YARN, largest_difference, random_tokens, relative_difference, small_config
from helpers.transformers_reference import released_names, transformers_model

TOLERANCE = 1e-5

SHAPES: dict[str, dict[str, Any]] = {
    "query rank, groups": {},
    "query rank, groups, YaRN": {"rope_scaling": YARN},
    "YaRN, unequal magnitudes": {"rope_scaling": YARN.model_copy(update={"mscale": 0.7, "mscale_all_dim": 0.9})},
    "no query rank": {"q_lora_rank": None},
    "no query rank, YaRN, no groups": {
        "q_lora_rank": None,
        "rope_scaling": YARN,
        "n_group": 1,
        "topk_group": 1,
    },
    "no groups": {"n_group": 1, "topk_group": 1},
    "all groups kept": {"topk_group": 4},
    "one expert per token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every expert for every token": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    "all layers dense": {"first_k_dense_replace": 3},
    "all layers with experts": {"first_k_dense_replace": 0},
    "gates not normalised": {"norm_topk_prob": False},
    "gates not scaled": {"routed_scaling_factor": 1.0},
    "three shared experts": {"n_shared_experts": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "another norm constant and base": {"rms_norm_eps": 1e-3, "rope_theta": 500.0},
}


class Outcome(NamedTuple):
    """The logits, loss and gradients of one model; gradients by released name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def parity_table() -> Iterator[list[str]]:
    rows = [
        "| Shape | Tokens | Largest logit | Δ logits | Δ loss | Δ gradients, relative |",
        "|---|---|---|---|---|---|",
    ]
    yield rows
    print("", *rows, sep="\n")


@pytest.mark.parametrize(("batch_size", "length"), [(3, 33), (1, 17)])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_agree(
    shape: str, batch_size: int, length: int, parity_table: list[str]
) -> None:
    config = small_config(**SHAPES[shape])
    theirs = transformers_model(config)
    ours = DeepSeekV3(config)
    load_released(ours, released_names(theirs.state_dict()))
    tokens_BS = random_tokens(config, batch_size, length)

    expected, found = _run_theirs(theirs, tokens_BS), _run_ours(ours, config, tokens_BS)

    assert found.gradients.keys() == expected.gradients.keys()
    logits = largest_difference(found.logits, expected.logits)
    loss = largest_difference(found.loss, expected.loss)
    gradients = max(
        relative_difference(found.gradients[name], gradient) for name, gradient in expected.gradients.items()
    )
    largest = expected.logits.abs().max().item()
    parity_table.append(
        f"| {shape} | {batch_size} × {length} | {largest:.1f} | {logits:.1e} | {loss:.1e} | {gradients:.1e} |"
    )
    assert largest > 1
    assert logits <= TOLERANCE * largest
    assert loss <= TOLERANCE
    assert gradients <= TOLERANCE


def _run_theirs(model: torch.nn.Module, tokens_BS: Tensor) -> Outcome:
    output = model(tokens_BS, labels=tokens_BS)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome(output.logits, output.loss, released_names(gradients))


def _run_ours(model: DeepSeekV3, config: ModelConfig, tokens_BS: Tensor) -> Outcome:
    logits_BSV = model(tokens_BS)
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome(logits_BSV, loss, to_released_names(config, gradients))

"""The training objective written out term by term."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.moe.balance import routers_of
from deepseek_v3.training.loss import training_losses
from helpers import random_tokens, small_config, small_model


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_total_is_the_sum_of_main_prediction_and_balance(depth: int) -> None:
    config = small_config(num_nextn_predict_layers=depth)
    model = small_model(config, torch.float64)
    tokens = random_tokens(config, 2, 12)
    losses = training_losses(model, tokens, prediction_weight=0.3, balance_weight=0.05)

    states = model.hidden_states(tokens[:, :-1])
    num_tokens = 2 * 11

    def cross_entropy_sum(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = hidden @ model.lm_head.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    main = cross_entropy_sum(states.main_BSD, tokens[:, 1:]) / num_tokens
    torch.testing.assert_close(losses.main, main)
    expected = main + 0.05 * sum(stats.balance_loss for stats in states.routing)
    for k, hidden in enumerate(states.predictions, start=1):
        expected = expected + 0.3 / depth * cross_entropy_sum(hidden, tokens[:, 1 + k :]) / num_tokens
    torch.testing.assert_close(losses.total, expected)
    assert losses.counts_LE.shape == (len(routers_of(model)), config.n_routed_experts)
    chosen = config.num_experts_per_tok
    per_layer = [2 * 11 * chosen] * config.num_moe_layers + [2 * (11 - k) * chosen for k in range(1, depth + 1)]
    assert losses.counts_LE.sum(-1).tolist() == per_layer


def test_a_model_without_experts_has_no_loads_and_no_balance_loss() -> None:
    config = small_config(first_k_dense_replace=3)
    losses = training_losses(small_model(config), random_tokens(config, 1, 9), 0.3, 0.05)
    assert losses.counts_LE.shape == (0, config.n_routed_experts)
    assert losses.balance == 0
    torch.testing.assert_close(losses.total, losses.main)


def test_masked_documents_lose_what_separate_documents_lose() -> None:
    config = small_config()
    model = small_model(config, torch.float64)
    first, second = random_tokens(config, 1, 7), random_tokens(config, 1, 9)
    packed = torch.cat((first, second), dim=1)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    hidden = model.hidden_states(packed, documents).main_BSD
    alone = torch.cat([model.hidden_states(part).main_BSD for part in (first, second)], dim=1)
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-6)  # rotary angles are float32

"""The training objective written out term by term."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.moe.balance import routers_of
from deepseek_v3.training.data import document_ids
from deepseek_v3.training.loss import Objective, count_targets, training_losses
from helpers.models import random_tokens, small_config, small_model


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_total_is_the_sum_of_main_prediction_and_balance(depth: int) -> None:
    config = small_config(num_nextn_predict_layers=depth)
    model = small_model(config, torch.float64)
    tokens = random_tokens(config, 2, 12)
    losses = training_losses(model, tokens, mtp_weight=0.3, balance_weight=0.05)

    states = model.hidden_states(tokens[:, :-1])
    num_tokens = 2 * 11

    def cross_entropy_sum(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = hidden @ model.lm_head.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    main = cross_entropy_sum(states.main_BSD, tokens[:, 1:]) / num_tokens
    torch.testing.assert_close(losses.main, main)
    expected = main + 0.05 * sum(stats.balance_loss for stats in states.routing)
    for k, hidden in enumerate(states.mtp, start=1):
        expected = expected + 0.3 / depth * cross_entropy_sum(hidden, tokens[:, 1 + k :]) / num_tokens
    torch.testing.assert_close(losses.total, expected)
    assert losses.counts_LE.shape == (len(routers_of(model)), config.n_routed_experts)
    chosen = config.num_experts_per_tok
    per_layer = [2 * 11 * chosen] * config.num_moe_layers + [2 * (11 - k) * chosen for k in range(1, depth + 1)]
    assert losses.counts_LE.sum(-1).tolist() == per_layer


def test_a_dense_model_has_no_loads_and_no_balance_loss() -> None:
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


# Of two sequences of 13 tokens, which end each document: of ordinary length, shorter than any depth, one with the
# last target in a document of its own, none and all of one token.
ENDS = {
    "three documents": ([3, 8], [6]),
    "documents shorter than the depths": ([1, 3, 4, 6, 7, 9, 11], [2, 5, 7]),
    "the last target alone": ([4, 11], []),
    "every token a document": (list(range(13)), list(range(13))),
}
END = 96


def packed(ends: tuple[list[int], list[int]]) -> torch.Tensor:
    tokens_BX = torch.randint(END, (2, 13))
    for tokens_X, places in zip(tokens_BX, ends, strict=True):
        tokens_X[places] = END
    return tokens_BX


def losses_of_separate_documents(model: torch.nn.Module, tokens_BX: torch.Tensor) -> list[torch.Tensor]:
    """Summed losses of the main model and of each depth: documents are run one by one, target by target."""
    depths = model.config.num_nextn_predict_layers
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(1 + depths)]
    for tokens_X in tokens_BX:
        places = (tokens_X == END).nonzero().flatten().tolist()
        for first, last in zip([0, *[p + 1 for p in places]], [*places, len(tokens_X) - 1], strict=True):
            document = tokens_X[first : last + 1]
            if not len(document):
                continue
            # Tokens behind the document reach no state that has a target in it.
            states = model.hidden_states(torch.nn.functional.pad(document, (0, depths))[None])
            for depth, hidden_BSD in enumerate([states.main_BSD, *states.mtp]):
                for place in range(len(document) - depth - 1):
                    logits_V = model.lm_head.weight @ hidden_BSD[0, place]
                    sums[depth] = sums[depth] - logits_V.log_softmax(-1)[document[place + depth + 1]]
    return sums


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_masked_documents_train_as_separate_ones_do(ends: tuple[list[int], list[int]], depth: int) -> None:
    config = small_config(num_nextn_predict_layers=depth)
    model = small_model(config, torch.float64)
    tokens_BX = packed(ends)
    documents_BX = document_ids(tokens_BX, END)
    num_targets = sum(token != END for tokens_X in tokens_BX.tolist() for token in tokens_X[:-1])
    assert count_targets(documents_BX) == num_targets

    losses = training_losses(model, tokens_BX, 0.3, 0.0, documents_BX)

    main, *depths = (summed / max(num_targets, 1) for summed in losses_of_separate_documents(model, tokens_BX))
    prediction = sum(depths) / depth if depth else torch.zeros(())
    expected = main + 0.3 * prediction
    # Rotary angles are float32, and those of a document differ by where it stands.
    assert losses.main.item() == pytest.approx(main.item(), rel=1e-6)
    assert losses.mtp.item() == pytest.approx(prediction.item(), rel=1e-6)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    found = torch.autograd.grad(losses.total, list(model.parameters()), materialize_grads=True)
    if not expected.requires_grad:
        assert not any(gradient.any() for gradient in found)
        return
    exact = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True, materialize_grads=True)
    for gradient, correct in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_unequal_targets_make_the_same_mean() -> None:
    config = small_config(num_nextn_predict_layers=2)
    model = small_model(config, torch.float64)
    tokens_BX = packed(ENDS["documents shorter than the depths"])
    documents_BX = document_ids(tokens_BX, END)
    whole = training_losses(model, tokens_BX, 0.3, 0.0, documents_BX)
    parts = [
        Objective(model)(
            tokens_BX[i : i + 1],
            0.3,
            0.0,
            documents_BX[i : i + 1],
            num_targets=count_targets(documents_BX) / 2,
        )
        for i in range(2)
    ]
    assert count_targets(documents_BX[:1]) != count_targets(documents_BX[1:])
    for name in ("total", "main", "mtp"):
        mean = sum(getattr(part, name) for part in parts) / 2
        torch.testing.assert_close(mean, getattr(whole, name), rtol=1e-6, atol=0.0)

"""Accepted drafts, counted position by position from all logits in float64."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.cross_entropy import chunked
from deepseek_v3.training.data import document_ids
from deepseek_v3.training.loss import Objective, count_drafts
from helpers.models import random_tokens, small_config, small_model

WINDOWS, LENGTH = 3, 40


def frequent_words(depth: int, dtype: torch.dtype) -> DeepSeekV3:
    """A model whose head prefers token 0, or 1 and 2 equally: many drafts are accepted, and there are ties."""
    model = small_model(small_config(num_nextn_predict_layers=depth), dtype)
    with torch.no_grad():
        model.lm_head.weight[3:] *= 0.1
        model.lm_head.weight[1:3] = -model.lm_head.weight[0]
    return model


def counted(model: DeepSeekV3, tokens_BX: Tensor, documents_BX: Tensor | None) -> list[list[list[int]]]:
    """The drafts and accepted drafts of each window and depth, one position after another."""
    inputs_BS = None if documents_BX is None else documents_BX[:, :-1]
    states = model.hidden_states(tokens_BX[:, :-1], inputs_BS)
    main, *depths = ([lowest(logits_SV) for logits_SV in model.logits(each)] for each in (states[0], *states.mtp))
    counts = [[[0, 0] for _ in depths] for _ in tokens_BX]
    for window, count in enumerate(counts):
        for i in range(LENGTH):
            for k, drafts in enumerate(depths, start=1):
                target = i + k + 1
                if target > LENGTH or (
                    documents_BX is not None and len(documents_BX[window, i : target + 1].unique()) > 1
                ):
                    break
                count[k - 1][0] += 1
                if drafts[window][i] != main[window][i + k]:
                    break
                count[k - 1][1] += 1
    return counts


def lowest(logits_SV: Tensor) -> list[int]:
    return [int((row == row.max()).nonzero()[0]) for row in logits_SV]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_drafts_are_those_counted_by_hand(depth: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), 7 * 97))
    monkeypatch.setattr(chunked, "_LEAST_ROWS", 1)
    torch.manual_seed(1)
    model = frequent_words(depth, torch.float64)
    tokens_BX = random_tokens(model.config, WINDOWS, LENGTH + 1)
    documents_BX = document_ids(tokens_BX % 9, end_of_text=0) if masked else None
    inputs_BS = None if documents_BX is None else documents_BX[:, :-1]
    states = model.hidden_states(tokens_BX[:, :-1], inputs_BS)
    found_BK2 = count_drafts(model, states, tokens_BX, documents_BX)
    assert found_BK2.dtype == torch.int64
    assert found_BK2.tolist() == counted(model, tokens_BX, documents_BX)
    drafted_K, accepted_K = found_BK2.sum(0).T
    assert (accepted_K > 0).all()
    assert (accepted_K < drafted_K).all()
    if not masked:
        assert drafted_K[0] == WINDOWS * (LENGTH - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_counting_leaves_the_main_loss_bit_for_bit(dtype: torch.dtype, masked: bool) -> None:
    model = frequent_words(2, dtype)
    objective, tokens_BX = Objective(model), random_tokens(model.config, 2, 17)
    documents_BX = document_ids(tokens_BX % 5, end_of_text=0) if masked else None
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    plain, counting = (
        objective(tokens_BX, 0.0, 0.0, documents_BX, main_only=True, with_drafts=with_drafts)
        for with_drafts in (False, True)
    )
    assert counting.main.equal(plain.main)
    assert counting.mtp == plain.mtp == 0
    assert plain.drafts_BK2 is None
    assert counting.drafts_BK2.shape == (2, 2, 2)
    assert all(tensor.equal(before[name]) for name, tensor in objective.state_dict().items())


def test_no_mtp_layers_make_no_drafts() -> None:
    model = frequent_words(0, torch.float32)
    tokens_BX = random_tokens(model.config, 2, 9)
    assert count_drafts(model, model.hidden_states(tokens_BX[:, :-1]), tokens_BX).shape == (2, 0, 2)

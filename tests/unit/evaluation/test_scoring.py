"""Scores of tokens against a brute-force loop in float64 and against Transformers' logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.evaluation.scoring import Scorer, Window, batches_by_length, rolling_windows
from deepseek_v3.interop.huggingface import load_released
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import CheckpointError
from helpers.models import YARN, small_config, small_model
from helpers.transformers_reference import released_names, transformers_model

START = 99


def _pairs(ids: list[int], context: int, stride: int | None = None) -> list[tuple[list[int], list[int]]]:
    windows = rolling_windows(np.array(ids, np.int64), START, context, stride)
    return [(window.inputs.tolist(), window.targets.tolist()) for window in windows]


def test_windows_of_a_text_that_is_too_long() -> None:
    disjoint = [([START, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]
    assert _pairs([*range(10)], context=4) == disjoint
    overlapping = [([START, 0, 1, 2], [0, 1, 2, 3]), ([2, 3, 4, 5], [4, 5, 6])]
    assert _pairs([*range(7)], context=4, stride=3) == overlapping
    assert _pairs([5], context=4) == [([START], [5])]
    assert _pairs([], context=4) == []


@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_every_token_is_a_target_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.none() | st.integers(1, context))
    pairs = _pairs([*range(length)], context, stride)
    assert [token for _, targets in pairs for token in targets] == [*range(length)]
    for index, (inputs, targets) in enumerate(pairs):
        assert len(targets) <= len(inputs) <= context
        start = START if inputs[0] == START else inputs[0]
        assert inputs == [start, *range(targets[-1] - len(inputs) + 1, targets[-1])]
        if index:
            assert len(inputs) == context
            assert len(inputs) - len(targets) + 1 >= context - (stride or context) + 1


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 64))
def test_batches_hold_every_window_once_and_little_padding(lengths: list[int], most: int) -> None:
    batches = [*batches_by_length(lengths, most)]
    assert sorted(index for batch in batches for index in batch) == [*range(len(lengths))]
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most for batch in batches)
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths, reverse=True)


def _windows(model: DeepSeekV3, lengths: list[tuple[int, int]]) -> list[Window]:
    random = np.random.default_rng(1)
    inputs = [random.integers(0, model.config.vocab_size, size) for size, _ in lengths]
    targets = [np.append(ids[len(ids) - n + 1 :], 7) for ids, (_, n) in zip(inputs, lengths, strict=True)]
    return [Window(*pair) for pair in zip(inputs, targets, strict=True)]


def _brute_force(logits_SV: torch.Tensor, targets: Int64Array) -> list[tuple[float, bool]]:
    scores = []
    for row, target in zip(logits_SV.double()[-len(targets) :].numpy(), targets.tolist(), strict=True):
        log_sum = row.max() + np.log(np.exp(row - row.max()).sum())
        scores.append((float(row[target] - log_sum), int(row.argmax()) == target))
    return scores


LENGTHS = [(9, 9), (1, 1), (64, 2), (30, 30), (5, 1), (64, 64), (9, 3)]


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_scores_equal_a_loop_over_single_windows(batch_tokens: int) -> None:
    model = small_model(small_config(), torch.float64).requires_grad_(False)
    windows = _windows(model, LENGTHS)
    windows[3] = Window(windows[3].inputs, model(torch.from_numpy(windows[3].inputs)[None])[0].argmax(-1).numpy())
    found = dict(Scorer(model, batch_tokens).score(windows))
    assert found.keys() == set(range(len(windows)))
    for index, (inputs, targets) in enumerate(windows):
        expected = _brute_force(model(torch.from_numpy(inputs)[None])[0], targets)
        assert found[index].log_probabilities.tolist() == pytest.approx([score for score, _ in expected], abs=1e-10)
        assert found[index].is_likeliest.tolist() == [likeliest for _, likeliest in expected]
    assert found[3].is_likeliest.all()


def test_windows_with_the_same_inputs_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(small_config()).requires_grad_(False)
    one, other = _windows(model, [(9, 1), (9, 1)])
    choices = [one, other, Window(one.inputs, np.array([3])), Window(one.inputs, np.append(one.inputs[1:], 5))]
    alone = [next(Scorer(model).score([window]))[1].log_probabilities for window in choices]
    shapes, run = [], model.final_states
    monkeypatch.setattr(model, "final_states", lambda tokens: shapes.append(tuple(tokens.shape)) or run(tokens))
    for index, scores in Scorer(model).score(choices):
        assert scores.log_probabilities == pytest.approx(alone[index], abs=1e-5)
    assert shapes == [(2, 9)]


def test_scores_equal_those_of_transformers() -> None:
    config = small_config(rope_scaling=YARN)
    theirs = transformers_model(config)
    model = DeepSeekV3(config)
    load_released(model, released_names(theirs.state_dict()))
    windows = _windows(model, LENGTHS)
    for index, scores in Scorer(model).score(windows):
        with torch.no_grad():
            logits_SV = theirs(torch.from_numpy(windows[index].inputs)[None]).logits[0]
        expected = [score for score, _ in _brute_force(logits_SV, windows[index].targets)]
        assert scores.log_probabilities.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_bfloat16_model_is_scored_in_float32() -> None:
    model = small_model(small_config()).requires_grad_(False)
    window = _windows(model, [(20, 20)])
    exact = next(Scorer(model).score(window))[1].log_probabilities
    model.compute_dtype = torch.bfloat16
    rounded = next(Scorer(model).score(window))[1].log_probabilities
    assert 0 < np.median(np.abs(exact - rounded)) < 0.1
    assert (rounded.astype(np.float32) != torch.tensor(rounded).bfloat16().float().numpy()).any()


def test_a_model_that_computes_nan_is_refused() -> None:
    model = small_model(small_config()).requires_grad_(False)
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        next(Scorer(model).score(_windows(model, [(3, 3)])))

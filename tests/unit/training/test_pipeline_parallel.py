"""The number of backward passes of a pipeline stage under zero-bubble schedules."""

from types import SimpleNamespace

import pytest
import torch

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.training.parallel.pipeline_parallel import ModelStage, PipelineEngine
from helpers.models import small_config


def has_one_backward(
    *, is_last: bool, depth: int = 0, tied: bool = False, recomputation: str = "none", compiled: bool = False
) -> bool:
    config = small_config(num_nextn_predict_layers=depth, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    if compiled:
        model.model.layers[-1].compile(backend="eager")
    stage = ModelStage(model, range(1, 2), is_first=False, is_last=is_last, documents=lambda _: None)
    parallel = SimpleNamespace(recomputation=recomputation)
    engine = SimpleNamespace(config=config, mesh=SimpleNamespace(parallel=parallel))
    return PipelineEngine._has_one_backward(engine, stage)


@pytest.mark.parametrize("tied", [False, True])
def test_a_middle_stage_has_two_backward_passes(tied: bool) -> None:
    assert not has_one_backward(is_last=False, depth=2, tied=tied)


@pytest.mark.parametrize(
    ("depth", "tied", "whole"),
    [(0, False, False), (0, True, False), (1, False, False), (1, True, True), (2, False, True), (3, True, True)],
)
def test_a_last_stage_that_repeats_weights_has_one_backward(depth: int, tied: bool, whole: bool) -> None:
    assert has_one_backward(is_last=True, depth=depth, tied=tied) == whole


@pytest.mark.parametrize("is_last", [False, True])
def test_recomputed_and_compiled_stages_have_one_backward(is_last: bool) -> None:
    assert has_one_backward(is_last=is_last, recomputation="full")
    assert has_one_backward(is_last=is_last, recomputation="selective")
    assert has_one_backward(is_last=is_last, compiled=True)

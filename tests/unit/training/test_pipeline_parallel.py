"""What a stage of a pipeline does in the backward pass, by what it is made of."""

from types import SimpleNamespace

import pytest
import torch

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.training.parallel.pipeline_parallel import ModelStage, PipelineEngine
from helpers.models import small_config


def goes_back_whole(
    *, is_last: bool, depth: int = 0, tied: bool = False, recomputation: str = "none", compiled: bool = False
) -> bool:
    config = small_config(num_nextn_predict_layers=depth, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    if compiled:
        model.model.layers[-1].compile(backend="eager")
    stage = ModelStage(model, range(1, 2), is_first=False, is_last=is_last, documents=lambda _: None)
    parallel = SimpleNamespace(recomputation=recomputation)
    engine = SimpleNamespace(config=config, ranks=SimpleNamespace(parallel=parallel))
    return PipelineEngine._has_one_backward(engine, stage)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_in_the_middle_goes_back_in_two_halves(tied: bool) -> None:
    assert not goes_back_whole(is_last=False, depth=2, tied=tied)


@pytest.mark.parametrize(
    ("depth", "tied", "whole"),
    [(0, False, False), (0, True, False), (1, False, False), (1, True, True), (2, False, True), (3, True, True)],
)
def test_the_last_stage_goes_back_whole_where_it_repeats_weights(depth: int, tied: bool, whole: bool) -> None:
    assert goes_back_whole(is_last=True, depth=depth, tied=tied) == whole


@pytest.mark.parametrize("is_last", [False, True])
def test_stages_that_recompute_or_are_compiled_go_back_whole(is_last: bool) -> None:
    assert goes_back_whole(is_last=is_last, recomputation="full")
    assert goes_back_whole(is_last=is_last, recomputation="selective")
    assert goes_back_whole(is_last=is_last, compiled=True)

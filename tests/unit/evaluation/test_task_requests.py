"""Requests of lm-evaluation-harness as windows and sampling; needs no lm-eval."""

from typing import Any

import pytest

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.scoring import Window
from deepseek_v3.evaluation.task_requests import TaskEncoder, TaskSampling
from deepseek_v3.utils.errors import GenerationError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["return return returns x x"] * 9, 280)


def _pairs(windows: list[Window]) -> list[tuple[list[int], list[int]]]:
    return [(window.inputs.tolist(), window.targets.tolist()) for window in windows]


@pytest.mark.parametrize(
    ("context", "continuation", "moved"),
    [("x", " return", ("x", " return")), ("x ", "return", ("x", " return")), ("x \n", "x", ("x", " \nx"))],
)
def test_spaces_belong_to_the_continuation(
    tokenizer: Tokenizer, context: str, continuation: str, moved: tuple[str, str]
) -> None:
    before, targets = TaskEncoder(tokenizer, 16).pair(context, continuation)
    assert (tokenizer.decode(before), tokenizer.decode(targets)) == moved
    assert before + targets == tokenizer.encode(context + continuation)


def test_an_empty_context_is_end_of_text(tokenizer: Tokenizer) -> None:
    encoder, end = TaskEncoder(tokenizer, 16), tokenizer.end_of_text
    assert encoder.pair("", "x return") == ([end], tokenizer.encode("x return"))
    assert encoder.pair("\n", "x") == ([end], tokenizer.encode("\nx"))
    assert encoder.pair("", "") == ([end], [])
    assert encoder.pair_windows([end], []) == []
    assert encoder.text_windows("") == []


def test_a_token_across_the_boundary_leaves_nothing(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("x retu")) > len(tokenizer.encode("x return"))
    assert TaskEncoder(tokenizer, 16).pair("x retu", "rn")[1] == []


def test_long_requests_keep_their_end(tokenizer: Tokenizer) -> None:
    encoder = TaskEncoder(tokenizer, 4)
    assert _pairs(encoder.pair_windows([9], [1, 2])) == [([9, 1], [1, 2])]
    assert _pairs(encoder.pair_windows([6, 7, 8, 9], [1, 2])) == [([7, 8, 9, 1], [1, 2])]
    assert _pairs(encoder.pair_windows([8, 9], [1, 2, 3, 4])) == [([9, 1, 2, 3], [1, 2, 3, 4])]
    assert _pairs(encoder.pair_windows([8, 9], [1, 2, 3, 4, 5])) == [
        ([9, 1, 2, 3], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [5]),
    ]
    ids = tokenizer.encode("x return x returns")
    scored = [target for _, targets in _pairs(encoder.text_windows("x return x returns")) for target in targets]
    assert scored == ids


@pytest.mark.parametrize(
    ("options", "temperature", "limit", "until"),
    [
        ({}, 0.0, 256, ()),
        ({"until": "\n", "max_gen_toks": 9}, 0.0, 9, ("\n",)),
        ({"until": ["a", "", "b"], "max_tokens": 9, "max_new_tokens": "8"}, 0.0, 8, ("a", "b")),
        ({"do_sample": False, "temperature": 0.7}, 0.0, 256, ()),
        ({"do_sample": True}, 1.0, 256, ()),
        ({"do_sample": True, "temperature": 0.0}, 0.0, 256, ()),
        ({"temperature": "0.7", "num_beams": 1, "until": None}, 0.7, 256, ()),
    ],
)
def test_options_of_tasks(options: dict[str, Any], temperature: float, limit: int, until: tuple[str, ...]) -> None:
    task = TaskSampling.from_options(options, 512)
    found = task.sampling
    assert (found.temperature, found.max_new_tokens, found.stop, task.until) == (temperature, limit, until, until)
    assert (found.top_p, found.top_k, found.repetition_penalty) == (1.0, None, 1.0)


def test_sampling_options_of_tasks() -> None:
    options = {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    found = TaskSampling.from_options(options, 512).sampling
    assert (found.top_k, found.top_p, found.repetition_penalty) == (5, 0.9, 1.2)
    assert TaskSampling.from_options({**options, "top_k": 0}, 512).sampling.top_k is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
        ({"until": 5}, "until = 5: expected a text"),
        ({"until": ["a", 5]}, "expected a text"),
        ({"temperature": "hot"}, "temperature = hot: expected a number"),
        ({"temperature": -1.0, "do_sample": True}, "temperature = -1.0"),
        ({"max_gen_toks": 64}, "no room for a prompt"),
        ({"max_gen_toks": 0}, "max_new_tokens = 0"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(GenerationError, match=expected):
        TaskSampling.from_options({"max_gen_toks": 9, **options}, 64)


def test_text_ends_before_the_first_stop_string() -> None:
    task = TaskSampling.from_options({"until": ["bc", "b"]}, 512)
    assert task.cut("a bc b") == "a "
    assert task.cut("abc") == "a"
    assert TaskSampling.from_options({}, 512).cut("abc") == "abc"
    assert TaskSampling.from_options({"until": ["d"]}, 512, "<end>").until == ("d", "<end>")

"""DeepSpeed under every ZeRO stage trains the same model as one process without it."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import deepspeed_runs, parallel_runs
from helpers.rank_pool import RankPool

STEPS, MORE_STEPS = 3, 10
MODEL = {"num_hidden_layers": 2}  # a dense layer and one of mixtures, besides one of prediction
TRAINING: dict[str, dict[str, Any]] = {
    "constant batch": {},
    "growing batch": {"batch_ramp": {"initial": 2, "increment": 2, "fraction": 0.5}},
}


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Callable[[str, int], dict[str, Any]]:
    """The same run in one process, by the name of its training section and its number of steps."""

    @cache
    def trained(name: str, steps: int) -> dict[str, Any]:
        parallel = {"micro_batch_size": 1}
        return pool.run(1, parallel_runs.train, steps, parallel, TRAINING[name], "cpu", False, MODEL)[0]

    return trained


@pytest.mark.parametrize(
    ("stage", "parallel", "training", "steps"),
    [
        (1, {"micro_batch_size": 4}, "constant batch", STEPS),
        (2, {"micro_batch_size": 4}, "constant batch", STEPS),
        (3, {"micro_batch_size": 4}, "constant batch", STEPS),
        (3, {"micro_batch_size": 2, "recomputation": "full"}, "constant batch", STEPS),
        (2, {"micro_batch_size": 1}, "growing batch", MORE_STEPS),
    ],
)
def test_zero_trains_as_one_process_does(
    deepspeed_pool: RankPool,
    alone: Callable[[str, int], dict[str, Any]],
    tmp_path: Path,
    stage: int,
    parallel: dict[str, Any],
    training: str,
    steps: int,
) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": stage}})
    expected_run = alone(training, steps)
    for result in deepspeed_pool.run(2, deepspeed_runs.train, file, steps, parallel, TRAINING[training], MODEL):
        assert len(result["rows"]) == len(expected_run["rows"]) >= steps
        for (found, counts, biases), (expected, all_counts, all_biases) in zip(
            result["rows"], expected_run["rows"], strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            np.testing.assert_array_equal(counts, all_counts)
            np.testing.assert_array_equal(biases, all_biases)
        np.testing.assert_allclose(result["held_out"], expected_run["held_out"], rtol=1e-5)
        for what in ("gradients", "weights"):
            expected = parallel_runs.whole([expected_run], what)
            assert result[what].keys() == expected.keys()
            for name, values in expected.items():
                bound = 1e-5 * np.abs(values).max() + 1e-9
                np.testing.assert_allclose(result[what][name], values, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_routers_choose_as_in_one_process(
    pool: RankPool, deepspeed_pool: RankPool, tmp_path: Path, stage: int
) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": stage}})
    found: dict[Any, Any] = {}
    for result in deepspeed_pool.run(2, deepspeed_runs.routings, file):
        found |= result
    (expected,) = pool.run(1, parallel_runs.routings, {})
    assert found.keys() == expected.keys()
    for place, routing in expected.items():
        np.testing.assert_array_equal(found[place][0], routing[0], err_msg=str(place))
        np.testing.assert_array_equal(found[place][1], routing[1], err_msg=str(place))


def test_a_field_that_deepspeed_does_not_know_is_refused(deepspeed_pool: RankPool, tmp_path: Path) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": 2, "bucket": 1}})
    for message in deepspeed_pool.run(2, deepspeed_runs.refusal, file):
        assert re.fullmatch(r"\S*deepspeed\.json: DeepSpeed refuses it: .*bucket.*", message)


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_zero_trains_in_fp8(recomputation: str, pool: RankPool, deepspeed_pool: RankPool, tmp_path: Path) -> None:
    """Stage 3 gathers the weights of networks that read them outside the modules that own them."""
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": stage})
    parallel = {"precision": "fp8", "recomputation": recomputation}
    model = MODEL | {"intermediate_size": 128}
    (expected,) = pool.run(1, parallel_runs.train, 1, parallel, None, "cpu", False, model)
    for found in deepspeed_pool.run(2, deepspeed_runs.train, file, 1, parallel, {}, model):
        np.testing.assert_allclose(found["rows"][0][0], expected["rows"][0][0], rtol=1e-3)
        np.testing.assert_allclose(found["rows"][0][0][0], expected["rows"][0][0][0], rtol=1e-5)

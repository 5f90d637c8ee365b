"""Every layout trains the same model as one process: losses, norms, gradients, loads, biases and weights agree."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from helpers import parallel_runs
from helpers.rank_pool import RankPool

STEPS, MORE_STEPS = 2, 6
TRAINED_LONGER = {"FSDP 2", "EP 2", "PP 2, zero bubble", "PP 2, DualPipeV"}  # two ranks, to save time
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 2": {"data_shard": 2},
    "FSDP 4": {"data_shard": 4},
    "FSDP 4, ZeRO 2": {"data_shard": 4, "zero_stage": 2},
    "FSDP 4, ZeRO 1": {"data_shard": 4, "zero_stage": 1},
    "copies 2": {"data_replicate": 2},
    "HSDP 2 × 2": {"data_replicate": 2, "data_shard": 2},
    "EP 2": {"data_replicate": 2, "expert": 2},
    "EP 4": {"data_replicate": 4, "expert": 4},
    "EP 2 × FSDP 4": {"data_shard": 4, "expert": 2},
    "EP 4 × FSDP 2": {"data_replicate": 2, "data_shard": 2, "expert": 4},
    "EP 2 × HSDP 2 × 2": {"data_replicate": 2, "data_shard": 2, "expert": 2},
    "EP 2, recomputed": {"data_shard": 2, "expert": 2, "recomputation": "full"},
    "EP 2, partly recomputed": {"data_shard": 2, "expert": 2, "recomputation": "selective"},
    "PP 2 × EP 2": {"pipeline": 2, "data_shard": 2, "expert": 2},
    "PP 2, zero bubble, × EP 2": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "data_shard": 2, "expert": 2},
    "PP 2": {"pipeline": 2, "micro_batch_size": 2},
    "PP 4": {"pipeline": 4},
    "PP 2, interleaved": {"pipeline": 2, "pipeline_schedule": "interleaved", "micro_batch_size": 2},
    "PP 2, zero bubble": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "micro_batch_size": 2},
    "PP 2, zero bubble, partly recomputed": {
        "pipeline": 2,
        "pipeline_schedule": "zero_bubble",
        "micro_batch_size": 2,
        "recomputation": "selective",
    },
    "PP 2, DualPipeV": {"pipeline": 2, "pipeline_schedule": "dualpipe_v"},
    "PP 2 × FSDP 2": {"pipeline": 2, "data_shard": 2},
    "PP 2 × copies 2": {"pipeline": 2, "data_replicate": 2},
}


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Callable[[int, int], dict[str, Any]]:
    """A run in one process, by its steps and the layers of its model."""

    @cache
    def trained(steps: int, layers: int) -> dict[str, Any]:
        model = {"num_hidden_layers": layers}
        return pool.run(1, parallel_runs.train, steps, {"micro_batch_size": 4}, {}, "cpu", False, model)[0]

    return trained


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(
    pool: RankPool, alone: Callable[[int, int], dict[str, Any]], name: str
) -> None:
    longer, layout = name in TRAINED_LONGER, LAYOUTS[name]
    layers = 4 if longer or "pipeline" in layout else 2  # some schedules have two stages on each of two ranks
    check(pool, alone(MORE_STEPS if longer else STEPS, layers), layout, 1e-5, layers=layers)


def test_a_pipeline_may_give_predictions_no_weight(pool: RankPool) -> None:
    """A zero-bubble schedule runs two backward passes through the prediction loss, whose gradient is 0 here."""
    layout, training = LAYOUTS["PP 2, zero bubble"], {"prediction": {"weight": 0.0, "final_weight": 0.0}}
    expected = pool.run(1, parallel_runs.train, 2, {}, training)[0]["rows"]
    for result in pool.run(2, parallel_runs.train, 2, layout, training):
        for (found, _, _), (figures, _, _) in zip(result["rows"], expected, strict=True):
            np.testing.assert_allclose(found, figures, rtol=1e-5)


@pytest.fixture(scope="module")
def masked_alone(pool: RankPool) -> dict[str, Any]:
    return pool.run(1, parallel_runs.train, 2, {}, {}, "cpu", True)[0]


@pytest.mark.parametrize("name", ["FSDP 4", "EP 2", "PP 2 × FSDP 2", "PP 2, zero bubble"])
def test_masked_documents_train_as_in_one_process(pool: RankPool, masked_alone: dict[str, Any], name: str) -> None:
    # AdamW's first updates enlarge the rounding of gradients near zero, of which masked documents make many.
    check(pool, masked_alone, LAYOUTS[name], 1e-5, masked=True, weight_tolerance=1e-4)


@pytest.fixture(scope="module")
def routings_alone(pool: RankPool) -> dict[Any, Any]:
    return pool.run(1, parallel_runs.routings, {})[0]


@pytest.mark.parametrize(
    "name", ["FSDP 2", "FSDP 4, ZeRO 1", "copies 2", "HSDP 2 × 2", "PP 2 × FSDP 2", "PP 2, zero bubble"]
)
def test_bfloat16_routers_choose_as_in_one_process(
    pool: RankPool, routings_alone: dict[Any, Any], name: str
) -> None:
    found: dict[Any, Any] = {}
    layout = {**LAYOUTS[name], "micro_batch_size": 1}  # one sequence at a time, as in one process
    for result in pool.run(ranks_of(layout), parallel_runs.routings, layout):
        found |= result
    assert found.keys() == routings_alone.keys()
    for place, (experts_TK, gates_TK) in routings_alone.items():
        np.testing.assert_array_equal(found[place][0], experts_TK, err_msg=str(place))
        np.testing.assert_array_equal(found[place][1], gates_TK, err_msg=str(place))


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    found = RankPool(min(4, torch.cuda.device_count()), "cuda")
    yield found
    found.close()


@pytest.fixture(scope="module")
def one_gpu(gpus: RankPool) -> dict[str, Any]:
    return gpus.run(1, parallel_runs.train, MORE_STEPS, {}, {}, "cuda")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_gpu_does(gpus: RankPool, one_gpu: dict[str, Any], name: str) -> None:
    if ranks_of(LAYOUTS[name]) > gpus.size:
        pytest.skip(f"needs {ranks_of(LAYOUTS[name])} GPUs")
    check(gpus, one_gpu, LAYOUTS[name], 1e-4)


SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "dualpipe_v")


@pytest.mark.parametrize(
    ("depth", "weight", "tied"),
    [
        (0, 0.3, False),
        (0, 0.3, True),
        (1, 0.0, False),
        (1, 0.3, True),  # as LAYOUTS are, but for the tied weights
        (2, 0.0, True),
        (2, 0.3, False),
        (2, 0.3, True),
    ],
)
def test_every_schedule_trains_heads_of_all_kinds(pool: RankPool, depth: int, weight: float, tied: bool) -> None:
    """The last stage uses some weights several times, and a loss with weight 0 has gradients of 0."""
    model = {"num_nextn_predict_layers": depth, "tie_word_embeddings": tied}
    training = {"prediction": {"weight": weight, "final_weight": weight}}
    (alone,) = pool.run(1, parallel_runs.train, 1, {"micro_batch_size": 2}, training, "cpu", False, model)
    for schedule in SCHEDULES:
        layout = {"pipeline": 2, "pipeline_schedule": schedule, "micro_batch_size": 2}
        results = pool.run(2, parallel_runs.train, 1, layout, training, "cpu", False, model)
        compare(results, alone, 2, 1e-5)


@pytest.mark.parametrize("schedule", ["zero_bubble", "dualpipe_v"])
def test_a_sharded_stage_may_repeat_weights(pool: RankPool, schedule: str) -> None:
    model = {"num_nextn_predict_layers": 1, "tie_word_embeddings": True}
    (alone,) = pool.run(1, parallel_runs.train, 2, {"micro_batch_size": 2}, {}, "cpu", False, model)
    layout = {"pipeline": 2, "pipeline_schedule": schedule, "data_shard": 2, "expert": 2}
    compare(pool.run(4, parallel_runs.train, 2, layout, {}, "cpu", False, model), alone, 2, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recomputed_layer_runs_again_only_once(pool: RankPool, schedule: str) -> None:
    """A backward pass in two halves could run the layer again for every weight."""
    layout = {"pipeline": 2, "pipeline_schedule": schedule, "micro_batch_size": 2, "recomputation": "full"}
    layers, micro_batches = 4 + 1, parallel_runs.SEQUENCES // 2
    assert sum(pool.run(2, parallel_runs.layer_runs, layout)) == 2 * layers * micro_batches


def ranks_of(layout: dict[str, Any]) -> int:
    return int(np.prod([layout.get(key, 1) for key in ("data_replicate", "data_shard", "pipeline")]))


def check(
    pool: RankPool,
    alone: dict[str, Any],
    layout: dict[str, Any],
    tolerance: float,
    *,
    layers: int = 4,
    masked: bool = False,
    weight_tolerance: float | None = None,
) -> None:
    """Trains on the ranks of a layout, and compares everything with one process."""
    world, stages = ranks_of(layout), layout.get("pipeline", 1)
    if stages == 1:  # every rank sums the gradients of two micro-batches
        layout = {**layout, "micro_batch_size": parallel_runs.SEQUENCES // world // 2}
    steps = len(alone["rows"])
    model = {"num_hidden_layers": layers}
    results = pool.run(world, parallel_runs.train, steps, layout, {}, pool.device, masked, model)
    compare(results, alone, stages, tolerance, weight_tolerance)


def compare(
    results: list[dict[str, Any]],
    alone: dict[str, Any],
    stages: int,
    tolerance: float,
    weight_tolerance: float | None = None,
) -> None:
    """Raises AssertionError where the results of the ranks of a pipeline differ from those of one process."""
    for result in results:
        for (found, counts, biases), (expected, all_counts, all_biases) in zip(
            result["rows"], alone["rows"], strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=tolerance)
            np.testing.assert_array_equal(counts, all_counts)
            np.testing.assert_array_equal(biases, all_biases)
    held_out = sum(result["held_out"] for result in results[:: max(len(results) // stages, 1)])
    np.testing.assert_allclose(held_out, alone["held_out"], rtol=tolerance)
    for what, relative in (("gradients", tolerance), ("weights", weight_tolerance or tolerance)):
        found, expected = parallel_runs.whole(results, what), parallel_runs.whole([alone], what)
        assert found.keys() == expected.keys()
        for tensor, values in expected.items():
            bound = relative * np.abs(values).max() + 1e-9
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=bound, err_msg=tensor)

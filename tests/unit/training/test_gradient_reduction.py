"""Gradients that travel in fewer bits: the error of their sums, and training with them under every layout."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.training.parallel.gradient_reduction import all_reduce, narrow_form, reduce_scatter
from helpers import parallel_runs
from helpers.rank_pool import RankPool

RANKS, PIECE = 4, 300  # a piece ends within a block of 128
ROUNDING = {"bf16": 2**-8, "fp8": 2**-4}  # the largest relative error of one number
SMALLEST = {"bf16": 0.0, "fp8": 2**-10 / 448}  # of a small number, as a share of its block's largest
# The relative L2 error of a gradient: rounded once by bfloat16 or e4m3, and once more by bfloat16 for replicas.
ERROR = {"bf16": 4e-3, "fp8": 4.5e-2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP 2": {"data_shard": 2},
    "FSDP 2, ZeRO 1": {"data_shard": 2, "zero_stage": 1},
    "copies 2": {"data_replicate": 2},
    "EP 2 × HSDP 2 × 2": {"data_replicate": 2, "data_shard": 2, "expert": 2},
    "PP 2, DualPipeV, × EP 2": {
        "pipeline": 2,
        "pipeline_schedule": "dualpipe_v",
        "data_shard": 2,
        "expert": 2,
        "recomputation": "full",
    },
}


def gradients_of(rank: int, size: int, bad: float | None = None) -> Tensor:
    """Random gradients over many orders of magnitude, a block of zeros, and perhaps a number not finite."""
    generator = torch.Generator().manual_seed(rank)
    gradients = torch.randn(size, generator=generator) * 10 ** torch.linspace(-12, 4, size)
    gradients[128:256] = 0
    if bad is not None and rank == 1:
        gradients[5] = bad
    return gradients


def sums(form: str, bad: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This rank's piece of a reduce-scatter, twice, and the result of an all-reduce of 777 gradients."""
    group, rounding = dist.group.WORLD, narrow_form(form, torch.device("cpu"))
    pieces = []
    for _ in range(2):
        pieces.append(torch.full((PIECE,), torch.nan))
        reduce_scatter(gradients_of(dist.get_rank(), RANKS * PIECE, bad), pieces[-1], group, rounding)
    everywhere = gradients_of(dist.get_rank(), 777, bad)
    all_reduce(everywhere, group, rounding)
    return pieces[0].numpy(), pieces[1].numpy(), everywhere.numpy()


@pytest.mark.parametrize("form", ROUNDING)
def test_a_sum_has_the_rounding_of_each_number_once(pool: RankPool, form: str) -> None:
    results = pool.run(RANKS, sums, form)
    for first, again, everywhere in results:
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(everywhere, results[0][2])
    found = np.concatenate([piece for piece, _, _ in results])
    parts = torch.stack([gradients_of(rank, RANKS * PIECE) for rank in range(RANKS)]).double()
    # The largest number of the block of each number; every piece begins with a block.
    blocks = torch.nn.functional.pad(parts.view(RANKS, RANKS, PIECE), (0, -PIECE % 128)).unflatten(-1, (-1, 128))
    largest = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).flatten(2)[..., :PIECE].flatten(1)
    bound = (ROUNDING[form] * parts.abs()).maximum(SMALLEST[form] * largest).sum(0) + 1e-6 * parts.abs().sum(0)
    assert (np.abs(found - parts.sum(0).numpy()) <= bound.numpy()).all()
    assert (found[128:256] == 0).all()

    parts = torch.stack([gradients_of(rank, 777) for rank in range(RANKS)]).double()
    np.testing.assert_allclose(
        results[0][2], parts.sum(0), rtol=2**-8, atol=2 * ROUNDING[form] * float(parts.abs().max())
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ROUNDING)
def test_a_number_that_is_not_finite_stays_so(pool: RankPool, form: str, bad: float) -> None:
    results = pool.run(RANKS, sums, form, bad)
    assert not np.isfinite(results[0][0][5])
    assert all(not np.isfinite(everywhere[5]) for _, _, everywhere in results)
    assert np.isfinite(results[1][0]).all()


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Callable[[int], dict[str, np.ndarray]]:
    """The gradients of a run in one process, by the layers of its model."""

    @cache
    def gradients(layers: int) -> dict[str, np.ndarray]:
        model = {"num_hidden_layers": layers}
        results = pool.run(1, parallel_runs.train, 1, {"micro_batch_size": 4}, {}, "cpu", False, model)
        return parallel_runs.whole(results, "gradients")

    return gradients


@pytest.mark.parametrize("form", ERROR)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process(
    pool: RankPool, alone: Callable[[int], dict[str, np.ndarray]], name: str, form: str
) -> None:
    """Every rank runs several micro-batches, whose gradients replicas sum once."""
    layout = LAYOUTS[name]
    world = int(np.prod([layout.get(key, 1) for key in ("data_replicate", "data_shard", "pipeline")]))
    model = {"num_hidden_layers": 4 if "pipeline" in layout else 2}
    layout = {**layout, "micro_batch_size": 1, "gradient_reduction": form}
    results = pool.run(world, parallel_runs.train, 1, layout, {}, "cpu", False, model)
    found, expected = parallel_runs.whole(results, "gradients"), alone(model["num_hidden_layers"])
    errors = {
        tensor: float(np.linalg.norm(found[tensor] - values) / np.linalg.norm(values))
        for tensor, values in expected.items()
    }
    in_float32 = {tensor for tensor in errors if "norm" in tensor or "mlp.gate.weight" in tensor}
    assert max(errors[tensor] for tensor in in_float32) < 1e-5
    assert 1e-3 < max(errors.values()) < ERROR[form]
    check_copies_agree(results)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if "pipeline" not in layout])
def test_gradients_on_gpus_are_those_of_one_gpu(name: str) -> None:
    """FSDP sums on streams of its own, which must not overtake each other."""
    layout = LAYOUTS[name]
    world = layout.get("data_replicate", 1) * layout.get("data_shard", 1)
    if world > torch.cuda.device_count():
        pytest.skip(f"needs {world} GPUs")
    gpus = RankPool(world, "cuda")
    try:
        expected = parallel_runs.whole(gpus.run(1, parallel_runs.train, 1, {}, {}, "cuda"), "gradients")
        for form, bound in ERROR.items():
            given = {**layout, "gradient_reduction": form}
            results = gpus.run(world, parallel_runs.train, 1, given, {}, "cuda")
            for tensor, values in parallel_runs.whole(results, "gradients").items():
                difference = np.linalg.norm(values - expected[tensor])
                assert difference < bound * np.linalg.norm(expected[tensor]), (form, tensor)
            check_copies_agree(results)
    finally:
        gpus.close()


def check_copies_agree(results: list[dict[str, Any]]) -> None:
    """Ranks that hold the same block of a parameter hold the same bits after the update."""
    held: dict[Any, np.ndarray] = {}
    for result in results:
        for name, (_, starts, values) in result["weights"].items():
            np.testing.assert_array_equal(held.setdefault((name, starts), values), values, err_msg=name)


def test_another_form_is_refused() -> None:
    with pytest.raises(ValidationError, match="gradient_reduction"):
        ParallelConfig(gradient_reduction="fp16")

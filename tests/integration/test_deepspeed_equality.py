"""DeepSpeed trains the same model under every ZeRO stage: all figures equal those of one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import deepspeed_helpers
import parallel_helpers
from rank_pool import RankPool

pytest.importorskip("deepspeed")
STEPS = 10


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """New processes for each test: DeepSpeed keeps the first process group that it saw."""
    found = RankPool(2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    pool = RankPool(1)
    try:
        return pool.run(1, parallel_helpers.train, STEPS, {})[0]
    finally:
        pool.close()


@pytest.mark.parametrize(("stage", "micro_batch_size"), [(1, 4), (2, 4), (3, 4), (3, 1)])
def test_zero_trains_as_one_process_does(
    pool: RankPool, alone: dict[str, Any], stage: int, micro_batch_size: int
) -> None:
    for result in pool.run(2, deepspeed_helpers.train, STEPS, stage, micro_batch_size):
        for (found, counts, biases), (expected, all_counts, all_biases) in zip(
            result["rows"], alone["rows"], strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            np.testing.assert_array_equal(counts, all_counts)
            np.testing.assert_array_equal(biases, all_biases)
        np.testing.assert_allclose(result["held_out"], alone["held_out"], rtol=1e-5)
        for what in ("gradients", "weights"):
            expected = parallel_helpers.whole([alone], what)
            assert result[what].keys() == expected.keys()
            for name, values in expected.items():
                bound = 1e-5 * np.abs(values).max() + 1e-9
                np.testing.assert_allclose(result[what][name], values, rtol=0, atol=bound, err_msg=name)

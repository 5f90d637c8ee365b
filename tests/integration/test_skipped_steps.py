"""A loss or gradient that is not finite, or too large, on one rank: all ranks skip the step, as if without it."""

import math
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.loss import Losses
from deepseek_v3.training.parallel.data_parallel import DataParallelEngine
from deepseek_v3.training.schedule import ScheduledStep, TrainingSchedule
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.monitoring import read_metrics
from helpers import deepspeed_runs, skipping_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"micro_batch_size": 4},
    "FSDP 2": {"data_shard": 2, "micro_batch_size": 2},
    "FSDP 2, ZeRO 1": {"data_shard": 2, "zero_stage": 1, "micro_batch_size": 2},
    "copies 2": {"data_replicate": 2, "micro_batch_size": 2},
    "EP 2": {"data_replicate": 2, "expert": 2, "micro_batch_size": 2},
    "EP 2 × HSDP 2 × 2": {"data_replicate": 2, "data_shard": 2, "expert": 2},
    "PP 2": {"pipeline": 2, "micro_batch_size": 2},
    "PP 2, interleaved": {"pipeline": 2, "pipeline_schedule": "interleaved", "micro_batch_size": 2},
    "PP 2, zero bubble": {"pipeline": 2, "pipeline_schedule": "zero_bubble", "micro_batch_size": 2},
    "PP 2, DualPipeV": {"pipeline": 2, "pipeline_schedule": "dualpipe_v", "micro_batch_size": 2},
    "PP 2 × EP 2": {"pipeline": 2, "data_shard": 2, "expert": 2, "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def without(pool: RankPool) -> Callable[[int], list[Any]]:
    """The steps of a run in one process that has no bad ones, by the layers of its model."""
    story = tuple("left out" if what else "" for what in skipping_runs.STORY)
    return cache(lambda layers: pool.run(1, skipping_runs.train, LAYOUTS["one process"], layers, story)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(
    pool: RankPool, without: Callable[[int], list[Any]], name: str
) -> None:
    layout = LAYOUTS[name]
    layers = 4 if "pipeline_schedule" in layout else 2  # these schedules have two stages on each of two ranks
    world = math.prod(layout.get(key, 1) for key in ("data_replicate", "data_shard", "pipeline"))
    check(pool.run(world, skipping_runs.train, layout, layers), without(layers))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_skip_a_step_under_deepspeed(
    deepspeed_pool: RankPool, without: Callable[[int], list[Any]], tmp_path: Path, stage: int
) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": stage}})
    check(deepspeed_pool.run(2, skipping_runs.train_by_deepspeed, file, 2), without(2))


def check(ranks: list[list[Any]], without: list[Any]) -> None:
    """Bad steps change nothing, and good ones equal those of a run that has no others."""
    for steps in ranks:
        skipped = [(False, True, 1)] * 5
        assert [step[:3] for step in steps] == [(True, False, 1), *skipped, (True, False, 2)]
        assert not math.isfinite(steps[1][4])
        assert not math.isfinite(steps[2][4])
        assert math.isnan(steps[3][3])
        assert math.isfinite(steps[3][4])
        assert steps[4][4] > skipping_runs.LIMITS.norm
        assert steps[5][3] > skipping_runs.LIMITS.loss
        for found, expected in ((steps[0], without[0]), (steps[-1], without[1])):
            assert found[3:] == pytest.approx(expected[3:], rel=1e-5)


class TestRun:
    """A run of `dsv3 train` in one process, with an infinite gradient in some steps."""

    @pytest.fixture
    def spoil(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Container[int]], None]:
        """Returns a function that puts infinity into the gradients of the given steps."""
        backward = DataParallelEngine._backward

        def make(numbers: Container[int]) -> None:
            def spoiled(engine: DataParallelEngine, batches: Any, step: ScheduledStep) -> Losses:
                losses = backward(engine, batches, step)
                if step.number in numbers:
                    engine.models[0].model.norm.weight.grad[3] = math.inf
                return losses

            monkeypatch.setattr(DataParallelEngine, "_backward", spoiled)

        return make

    def test_it_counts_skipped_steps_and_resumes_bit_for_bit(
        self, tmp_path: Path, spoil: Callable[[Container[int]], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Checkpoints are saved after steps 2 (between two bad steps), 4 and 6."""
        spoil((2, 3, 5))
        config, folder = write_run(tmp_path), tmp_path / "checkpoints"
        result = dsv3("train", "--device", "cpu", "--config", config)
        assert result.exit_code == 0, result.output
        assert "step 2: total loss" in caplog.text
        assert "gradient norm inf: skipped on all ranks" in caplog.text
        assert "2 in a row, 2 in all" in caplog.text
        assert "3 of 6 steps were skipped" in caplog.text
        whole = read_metrics(tmp_path / "run" / "metrics.jsonl")
        steps = [record for record in whole if "loss" in record]
        assert [record["skipped_steps"] for record in steps] == [0, 1, 2, 2, 3, 3]
        assert [record["gradient_norm"] is None for record in steps] == [False, True, True, False, True, False]
        plan = TrainingSchedule(load_config(config))
        assert [record["learning_rate"] for record in steps] == [plan.step(n).learning_rate for n in range(1, 7)]
        last = load_checkpoint(folder / "checkpoint_step_6.pt")
        assert last["optimizer"]["num_steps"] == 3
        saved = [load_checkpoint(folder / f"checkpoint_step_{n}.pt") for n in (2, 4, 6)]
        assert [state["skipped_in_a_row"] for state in saved] == [1, 0, 0]
        for step in (2, 4):
            for later in range(step + 1, 7):
                (folder / f"checkpoint_step_{later}.pt").unlink(missing_ok=True)
            again = dsv3("train", "--device", "cpu", "--config", config, "--resume", "latest")
            assert again.exit_code == 0, again.output
            resumed = load_checkpoint(folder / "checkpoint_step_6.pt")
            tensors, expected = (flatten({**state, "config": {}})[0] for state in (resumed, last))
            assert tensors.keys() == expected.keys()
            assert all(tensor.equal(expected[name]) for name, tensor in tensors.items())
            found = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
            timed = {"tokens_per_second": 0, "memory_bytes": 0, "time": 0}
            assert [{**record, **timed} for record in found] == [{**record, **timed} for record in steps]

    @pytest.mark.parametrize("interval", [1, 100])
    def test_too_many_in_a_row_stop_it(
        self, tmp_path: Path, spoil: Callable[[Container[int]], None], interval: int
    ) -> None:
        """The run stops after the same step whatever its logging interval is."""
        spoil(range(3, 1000))
        words = ["--set", "training.max_skipped_steps=2", "--set", f"logging.interval_steps={interval}"]
        config = write_run(tmp_path, steps=100)
        message = message_of(dsv3("train", "--device", "cpu", "--config", config, *words))
        assert "step 5: total loss" in message
        assert "gradient norm inf; 3 steps in a row were skipped" in message
        assert "training.max_skipped_steps = 2" in message
        assert "nothing was changed since step 2" in message
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
            "checkpoint_step_2.pt",
            "checkpoint_step_4.pt",
        ]

    def test_steps_in_a_row_are_counted_across_a_resume(
        self, tmp_path: Path, spoil: Callable[[Container[int]], None]
    ) -> None:
        spoil(range(2, 1000))
        words = ["--set", "training.max_skipped_steps=3"]
        config = write_run(tmp_path, steps=100)
        message = message_of(dsv3("train", "--device", "cpu", "--config", config, *words))
        assert "step 5: total loss" in message
        assert (
            message_of(dsv3("train", "--device", "cpu", "--config", config, *words, "--resume", "latest"))
            == message
        )

    def test_none_may_be_allowed(self, tmp_path: Path, spoil: Callable[[Container[int]], None]) -> None:
        spoil((1,))
        words = ["--set", "training.max_skipped_steps=0"]
        message = message_of(dsv3("train", "--device", "cpu", "--config", write_run(tmp_path), *words))
        assert "step 1: total loss" in message
        assert not (tmp_path / "checkpoints").exists()

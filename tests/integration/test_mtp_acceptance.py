"""Every layout counts the same accepted drafts of the MTP layers as one process, and counting changes nothing."""

import math
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.monitoring import read_metrics
from helpers import deepspeed_runs, parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import write_run

CPU = torch.device("cpu")
MODEL = ["parallel.precision=fp32", "model.num_hidden_layers=4", "model.num_nextn_predict_layers=2"]
# 41 windows: a number that ranks and micro-batches do not divide, and some windows with several documents.
RECIPE = [*MODEL, "training.evaluation.tokens=1312", "parallel.micro_batch_size=1"]
LAYOUTS = {
    "copies 2": ["parallel.data_replicate=2"],
    "FSDP 2, micro-batches of 2": ["parallel.data_shard=2", "parallel.micro_batch_size=2"],
    "EP 2": ["parallel.data_replicate=2", "parallel.expert=2"],
    "1F1B": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved"],
    "zero bubble": ["parallel.pipeline=2", "parallel.pipeline_schedule=zero_bubble"],
    "DualPipeV": ["parallel.pipeline=2", "parallel.pipeline_schedule=dualpipe_v"],
}
MASKED = ["data.mask_documents=true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("run"), 2)
    open_tokens(load_config(path))
    return path


@pytest.fixture(scope="module")
def alone(pool: RankPool, run: Path) -> parallel_runs.Measured:
    (found,) = pool.run(1, parallel_runs.measured, run, RECIPE)
    assert all(0.1 < share < 0.9 for share in found.mtp_acceptance)
    assert len(set(found.mtp_acceptance)) == 2
    return found


def check(results: list[parallel_runs.Measured], expected: parallel_runs.Measured) -> None:
    for found in results:
        assert found.mtp_acceptance == expected.mtp_acceptance
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_count_what_one_counts(
    pool: RankPool, run: Path, alone: parallel_runs.Measured, name: str
) -> None:
    check(pool.run(2, parallel_runs.measured, run, [*RECIPE, *LAYOUTS[name]]), alone)


def test_a_pipeline_of_shards_masks_documents(pool: RankPool, run: Path, alone: parallel_runs.Measured) -> None:
    (expected,) = pool.run(1, parallel_runs.measured, run, [*RECIPE, *MASKED])
    assert expected.mtp_acceptance != alone.mtp_acceptance
    layout = ["parallel.pipeline=2", "parallel.data_shard=2", "parallel.expert=2"]
    check(pool.run(4, parallel_runs.measured, run, [*RECIPE, *MASKED, *layout]), expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_counts_what_one_counts(
    deepspeed_pool: RankPool, tmp_path: Path, run: Path, alone: parallel_runs.Measured, stage: int
) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": stage}})
    check(deepspeed_pool.run(2, deepspeed_runs.measured, file, run, RECIPE), alone)


def trained(run: Path, folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Trains two steps and measures after each; returns the last checkpoint and the records of the evaluations."""
    own = [f"checkpoint.directory={folder}/saved", f"logging.directory={folder}/log", *overrides]
    result = Trainer(load_config(run, ["training.evaluation.interval_steps=1", *own]), CPU).run()
    records = [each for each in read_metrics(folder / "log" / "metrics.jsonl") if "holdout_loss" in each]
    assert len(records) == 2
    return flatten(load_checkpoint(result.checkpoint))[0], records


def shares(record: dict[str, float]) -> list[str]:
    return [name for name in record if "acceptance" in name]


def test_counting_changes_neither_the_training_nor_the_loss(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="deepseek_v3")
    counted, records = trained(run, tmp_path / "on", *MODEL)
    assert caplog.text.count("MTP drafts accepted: ") == 2
    plain, others = trained(run, tmp_path / "off", *MODEL, "training.evaluation.mtp_acceptance=false")
    assert caplog.text.count("MTP drafts accepted: ") == 2
    assert counted.keys() == plain.keys()
    assert all(tensor.equal(plain[name]) for name, tensor in counted.items())
    for record, other in zip(records, others, strict=True):
        assert shares(record) == ["holdout_mtp_acceptance_1", "holdout_mtp_acceptance_2"]
        assert 0 <= record["holdout_mtp_acceptance_1"] <= 1
        assert shares(other) == []
        assert record["holdout_loss"] == other["holdout_loss"]


def test_a_model_without_mtp_layers_logs_no_acceptance(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="deepseek_v3")
    _, records = trained(run, tmp_path, "model.num_nextn_predict_layers=0")
    assert [shares(record) for record in records] == [[], []]
    assert "MTP drafts" not in caplog.text
    assert all(math.isfinite(record["holdout_loss"]) for record in records)

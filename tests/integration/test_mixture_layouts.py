"""A run on a mixture ends with the same held-out losses under every layout."""

from pathlib import Path

import pytest
import yaml

from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from helpers import deepspeed_runs, parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import SEQUENCE_LENGTH, run_fields, write_corpus

LAYOUTS = [["parallel.data_shard=2"], ["parallel.pipeline=2"], ["parallel.data_replicate=2", "parallel.expert=2"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = {"holdout": 0.2, "fim_rate": 0.0, "seed": 0, "sequence_length": SEQUENCE_LENGTH}
    tokenize_corpus(str(write_corpus(folder / "text")), folder / "a", vocab_size=270, tokenizer=None, **options)
    (folder / "words.txt").write_text(" ".join(map(str, range(4000))))
    known = folder / "a" / "tokenizer.json"
    tokenize_corpus(str(folder / "words.txt"), folder / "b", vocab_size=None, tokenizer=known, **options)
    fields = run_fields(folder, steps=2)
    fields["data"] = {
        "sources": [{"name": name, "path": str(folder / name), "weight": 1 + (name == "a")} for name in "ab"]
    }
    fields["parallel"]["micro_batch_size"] = 1
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def outputs(run: Path, name: str) -> list[str]:
    return [f"checkpoint.directory={run.parent}/{name}", f"logging.directory={run.parent}/{name}/log"]


@pytest.fixture(scope="module")
def alone(run: Path, pool: RankPool) -> float:
    ((step, loss),) = pool.run(1, parallel_runs.train_run, run, outputs(run, "alone"), None)
    assert step == 2
    return loss


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[-1])
def test_ranks_train_on_the_samples_of_one(run: Path, pool: RankPool, alone: float, layout: list[str]) -> None:
    overrides = [*outputs(run, layout[-1]), *layout]
    results = pool.run(2, parallel_runs.train_run, run, overrides, None)
    assert results == [(2, pytest.approx(alone, abs=1e-5))] * 2


def test_deepspeed_trains_on_the_same_samples(run: Path, deepspeed_pool: RankPool, alone: float) -> None:
    file = deepspeed_runs.write_settings(run.parent, {"zero_optimization": {"stage": 2}})
    results = deepspeed_pool.run(2, deepspeed_runs.train_run, file, run, outputs(run, "deepspeed"), None)
    assert results == [(2, pytest.approx(alone, abs=1e-5))] * 2

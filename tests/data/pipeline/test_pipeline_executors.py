"""The output has the same bytes with 1, 2 or 4 workers, with Ray, from the shares of an array, in any order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.sample_corpora import write_damaged_corpus
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.pipeline import digests, pipeline_config

PIPELINE = ["preliminary_cleaning", "exact_deduplication", "deduplication", "heuristic_filters", "pii", "mixing"]
MIXING = {"mixing": {"weights": {"web/*": 2, "*": 1}, "tokens": 60_000}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "corpus"
    write_damaged_corpus(folder, 300, seed=3)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("output") / "clean"
    manifest = run_pipeline(pipeline_config(str(corpus), output, PIPELINE, **MIXING))
    assert len(manifest["outputs"]) > 2
    return digests(output)


@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_write_the_same_bytes(
    corpus: Path, expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE, workers=workers, **MIXING))
    assert digests(tmp_path / "out") == expected


def test_little_memory_makes_more_tasks_and_the_same_bytes(
    corpus: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_v3.data.pipeline.resources._WORKER_BYTES", 0)
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE, memory=6 * 10**6, **MIXING)
    run_pipeline(config)
    assert digests(tmp_path / "out") == expected


def test_ray(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE, workers=2, engine="ray", **MIXING))
    assert digests(tmp_path / "out") == expected


def test_shards_and_merge(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE, **MIXING)
    for share in (2, 0):
        assert run_pipeline(config, shard=(share, 3)) == {}
    with pytest.raises(DataError, match="work units are not read yet"):
        run_pipeline(config, merge=True)
    run_pipeline(config, shard=(1, 3))
    run_pipeline(config, merge=True)
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3)])
def test_a_share_out_of_range_is_refused(corpus: Path, tmp_path: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected i/n"):
        run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE), shard=shard)


def test_the_order_of_the_input_files_does_not_matter(tmp_path: Path) -> None:
    write_damaged_corpus(tmp_path / "one" / "in", 100)
    sources = sorted((tmp_path / "one" / "in").rglob("*.*"), reverse=True)
    for source in sources:
        target = tmp_path / "two" / source.relative_to(tmp_path / "one")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for copy in ("one", "two"):
        run_pipeline(pipeline_config(str(tmp_path / copy / "in"), tmp_path / copy / "out", PIPELINE))
    assert digests(tmp_path / "one" / "out") == digests(tmp_path / "two" / "out")
    patterns = [str(tmp_path / "one" / "in" / "web"), str(tmp_path / "one" / "in" / "list.json")]
    for name, given in (("forward", patterns), ("backward", patterns[::-1])):
        run_pipeline(pipeline_config(given, tmp_path / name, PIPELINE))
    assert digests(tmp_path / "forward") == digests(tmp_path / "backward")

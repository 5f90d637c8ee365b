"""Incremental runs: a document of a previous run makes its copies in a later run duplicates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.sample_corpora import synthetic_documents
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.pipeline import pipeline_config, rows_of, write_lines

PIPELINE = ["exact_deduplication", "deduplication"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    rows = [{"id": f"old-{number}", "text": text} for number, text in enumerate(synthetic_documents(60, seed=1))]
    config = pipeline_config(str(write_lines(folder / "a.jsonl", rows)), folder / "out", PIPELINE, keep_keys=True)
    assert run_pipeline(config)["counts"]["kept"] == 60
    return folder / "out"


def _new_rows() -> list[dict[str, Any]]:
    seen = synthetic_documents(60, seed=1)
    near = f"{seen[5]} And one more remark at the end."
    fresh = synthetic_documents(10, seed=2)
    return [{"id": f"new-{number}", "text": text} for number, text in enumerate([seen[3], near, *fresh, fresh[0]])]


def test_documents_of_a_previous_run_count_as_seen(first: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "b.jsonl", _new_rows())
    config = pipeline_config(str(source), tmp_path / "out", PIPELINE, previous_runs=[str(first)])
    counts = run_pipeline(config)["counts"]
    assert counts == {"input": 13, "kept": 10, "dropped": 3, "quarantined": 0, "copies": 0}
    dropped = {row["id"]: row for row in rows_of(tmp_path / "out", "dropped")}
    assert dropped["new-0"]["reason"] == "exact_duplicate"
    assert json.loads(dropped["new-0"]["figures"])["duplicate_of"] == "old-3"
    assert dropped["new-1"]["reason"] == "near_duplicate"
    assert json.loads(dropped["new-1"]["figures"])["duplicate_of"] == "old-5"
    assert json.loads(dropped["new-12"]["figures"])["duplicate_of"] == "new-2"


def test_a_chain_of_runs(first: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    source = write_lines(tmp_path / "b.jsonl", _new_rows())
    run_pipeline(pipeline_config(str(source), second, PIPELINE, previous_runs=[str(first)], keep_keys=True))
    config = pipeline_config(str(source), tmp_path / "third", PIPELINE, previous_runs=[str(first), str(second)])
    assert run_pipeline(config)["counts"]["kept"] == 0


def test_a_run_without_keys_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "b.jsonl", _new_rows())
    config = pipeline_config(str(source), tmp_path / "out", PIPELINE, previous_runs=[str(tmp_path)])
    with pytest.raises(DataError, match="holds no keys of exact_deduplication"):
        run_pipeline(config)


def test_keys_of_other_options_are_refused(first: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "b.jsonl", _new_rows())
    config = pipeline_config(
        str(source), tmp_path / "out", ["deduplication"], previous_runs=[str(first)], deduplication={"ngram": 3}
    )
    with pytest.raises(ConfigError, match=r"deduplication\.ngram = 3, and the keys in .* were made with 5"):
        run_pipeline(config)

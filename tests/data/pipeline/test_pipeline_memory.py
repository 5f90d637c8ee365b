"""What a part of a run holds in memory is bounded, and shards that start together agree on the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from deepseek_v3.data.pipeline import resume
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.pipeline.run_folder import RunFolder
from deepseek_v3.utils.errors import DataError
from helpers.pipeline import pipeline_config


@pytest.mark.parametrize("row", [{"words": "x" * 1000}, {"text": "x", "other": "y" * 1000}, {"text": "x" * 1000}])
def test_a_part_ends_whatever_its_bytes_are(tmp_path: Path, row: dict[str, str]) -> None:
    rows = [{"text": "A text."}] * 100 + [row] * 20_000
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(each).encode() + b"\n" for each in rows), 1)
    )
    config = pipeline_config(str(tmp_path / "a.jsonl.gz"), tmp_path / "out", [], work_unit_size="5MB")
    run_pipeline(config, shard=(0, 1))
    parts = [*(tmp_path / "out" / ".work" / "pass-0").glob("*/part.json")]
    assert len(parts) == 3


def test_shards_that_start_together_agree_on_the_run(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    one, other = (
        resume.describe_run(pipeline_config(str(tmp_path), tmp_path, [], shard_size=size), []) for size in (10, 20)
    )
    run_folder.work.mkdir()
    resume.start(run_folder, one)
    resume.start(run_folder, one)
    with pytest.raises(DataError, match="the run began with another shard_size: 10, now 20"):
        resume.start(run_folder, other)
    assert sorted(path.name for path in run_folder.work.iterdir()) == ["claim.json", "run.json"]

"""Small runs of the data pipeline, and readers for their outputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.run import run_pipeline

SHEET = ["preliminary_cleaning", "deduplication", "quality_filtering"]


def pipeline_config(source: object, output: Path, pipeline: list[str], **fields: Any) -> PreprocessConfig:
    """The configuration of a run with small work units and shards, so that a small corpus has many."""
    small = {"work_unit_size": "64KB", "shard_size": "200KB", "max_record_size": "1MB", "workers": 1}
    paths = {"input_path": source, "output_dir": str(output), "pipeline": pipeline}
    return section_from_dict(PreprocessConfig, {**small, **paths, **fields}, "test")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a JSON lines file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def undisturbed(source: Path, output: Path, pipeline: list[str]) -> dict[str, str]:
    """The digests of a run that nothing disturbs."""
    run_pipeline(pipeline_config(str(source), output, pipeline))
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    """The SHA-256 of each output file of a run, except the manifest, which holds the configuration."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_of(output: Path, folder: str) -> list[dict[str, Any]]:
    """The rows of `data`, `dropped` or `quarantine`, in order."""
    files = sorted((output / folder).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]

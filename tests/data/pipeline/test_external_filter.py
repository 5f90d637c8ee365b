"""A filter from outside the package: its own module and options, in a whole run of the pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.utils.errors import ConfigError
from helpers.pipeline import digests, pipeline_config, rows_of, write_lines
from helpers.runs import dsv3, message_of

MODULE = """
from typing import Any

import pyarrow as pa

from deepseek_v3.config.base import PositiveInt, StageConfig
from deepseek_v3.config.extensions import FilterExtension
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome


class ShoutingConfig(StageConfig):
    max_exclamation_marks: PositiveInt = 2


class ShoutingFilter(Stage):
    name = "shouting"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(ShoutingConfig, options, "ShoutingFilter")

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        counts = [text.count("!") for text in batch.column("text").to_pylist()]
        limit = self.options.max_exclamation_marks
        drops = [
            Drop(row, "too_loud", {"found": count, "limit": limit}, "!" * count)
            for row, count in enumerate(counts)
            if count > limit
        ]
        return outcome(self.name, batch, drops, {"exclamation_marks": counts})


class NamelessFilter(ShoutingFilter):
    name = "other"


SHOUTING = FilterExtension("shouting", ShoutingConfig, lambda: ShoutingFilter)
NAMELESS = FilterExtension("nameless", ShoutingConfig, lambda: NamelessFilter)
"""
ENTRY_POINTS = "[deepseek_v3.filters]\nshouting = shouting_filter:SHOUTING\nnameless = shouting_filter:NAMELESS\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution of one module, with entry points."""
    folder = tmp_path / "site-packages"
    information = folder / "shouting_filter-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "shouting_filter.py").write_text(MODULE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting-filter\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "shouting_filter", raising=False)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"id": f"doc-{n}", "text": f"Document {n} says hello" + "!" * (n % 5)} for n in range(400)]
    return write_lines(tmp_path / "in" / "a.jsonl", rows)


def test_a_filter_of_another_package_runs_with_any_workers(package: Path, corpus: Path, tmp_path: Path) -> None:
    fields = {"work_unit_size": "4KB", "shouting": {"max_exclamation_marks": 3}}
    for workers in (1, 2):
        config = pipeline_config(str(corpus), tmp_path / f"out-{workers}", ["shouting"], workers=workers, **fields)
        manifest = run_pipeline(config)
        assert manifest["counts"]["dropped"] == 80
        assert manifest["config"]["pipeline"] == ["shouting"]
        assert manifest["config"]["shouting"] == {"max_drop_warning": 0.5, "max_exclamation_marks": 3}
    assert digests(tmp_path / "out-1") == digests(tmp_path / "out-2")
    dropped = rows_of(tmp_path / "out-2", "dropped")
    assert {(row["stage"], row["reason"], row["trigger"]) for row in dropped} == {("shouting", "too_loud", "!!!!")}
    assert json.loads(dropped[0]["figures"]) == {"found": 4, "limit": 3}
    report = (tmp_path / "out-2" / "report.html").read_text("utf-8")
    assert "Shouting: 400 in, 320 out" in report
    assert "Shouting: exclamation marks" in report


def test_a_registered_filter_resumes_its_run(
    package: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "shouting_filter-1.0.dist-info" / "entry_points.txt").unlink()
    monkeypatch.setattr("deepseek_v3.config.extensions._registered", {})
    from shouting_filter import SHOUTING  # type: ignore[import-not-found]

    from deepseek_v3.config.extensions import register_filter

    register_filter(SHOUTING)
    config = pipeline_config(str(corpus), tmp_path / "out", ["shouting"])
    assert run_pipeline(config, shard=(0, 1)) == {}
    manifest = run_pipeline(config)
    assert manifest["counts"]["dropped"] == 160
    assert run_pipeline(config) == manifest


def test_a_stage_of_another_name_is_refused(package: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="filter nameless: its `load` gives a NamelessFilter with the name other"):
        run_pipeline(pipeline_config(str(corpus), tmp_path / "out", ["nameless"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pipeline=[shoutin]", "expected one of preliminary_cleaning"),
        ("shouting.max_exclamation_marks=0", "shouting.max_exclamation_marks"),
        ("shouting.max_marks=3", "shouting.max_marks"),
    ],
)
def test_mistakes_about_a_filter_are_one_line(
    package: Path, corpus: Path, tmp_path: Path, setting: str, message: str
) -> None:
    fields = {"input_path": str(corpus), "output_dir": str(tmp_path / "out"), "pipeline": ["shouting"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    assert message in message_of(dsv3("preprocess", "--config", str(tmp_path / "run.yaml"), "--set", setting))

"""Fields that were renamed: the former name is refused with the present one, and stored configs are still read."""

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deepseek_v3.config.loading import load_section
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.resume import check_same_run, describe_run
from deepseek_v3.utils.errors import ConfigError, DataError

RUN = "input_path: raw\noutput_dir: clean\npipeline: [deduplication]\n"
STAGES = (
    "preliminary_cleaning exact_deduplication deduplication heuristic_filters language quality_filtering pii "
    "decontamination mixing"
).split()
FORMER = {
    "earlier": "previous_runs",
    "piece_size": "work_unit_size",
    "deduplication.kept_threshold": "cluster_threshold",
    **{f"{stage}.alarm": "max_drop_warning" for stage in STAGES},
}


def _message(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load_section(PreprocessConfig, path, overrides)
    return str(error.value)


@pytest.mark.parametrize(("former", "present"), FORMER.items())
def test_a_former_name_is_refused_with_the_present_one(tmp_path: Path, former: str, present: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    expected = f"{former}: this field was renamed; use {present}"
    assert _message(path, [f"{former}=1"]) == f"--set {former}=1: {expected}"
    section, _, name = former.rpartition(".")
    path.write_text(RUN + (f"{section}:\n  {name}: 1\n" if section else f"{name}: 1\n"))
    assert _message(path, []) == f"{path}:{5 if section else 4}: {expected}"


def test_every_renamed_field_is_listed_here() -> None:
    sections = {name: PreprocessConfig.subsection(name) for name in PreprocessConfig.model_fields}
    found = dict(PreprocessConfig.renamed_fields())
    for name, section in sections.items():
        found |= {f"{name}.{old}": new for old, new in (section.renamed_fields() if section else {}).items()}
    assert found == FORMER


def test_stored_fields_are_read_under_their_present_names() -> None:
    stored: dict[str, Any] = {
        "pipeline": ["deduplication"],
        "piece_size": 5,
        "earlier": ["a"],
        "deduplication": {"alarm": 0.5, "kept_threshold": None, "ngram": 5},
        "unknown": {"alarm": 1},
    }
    assert PreprocessConfig.with_present_names(stored) == {
        "pipeline": ["deduplication"],
        "work_unit_size": 5,
        "previous_runs": ["a"],
        "deduplication": {"max_drop_warning": 0.5, "cluster_threshold": None, "ngram": 5},
        "unknown": {"alarm": 1},
    }


def test_a_run_that_began_under_former_names_goes_on(tmp_path: Path) -> None:
    config = PreprocessConfig(input_path="raw", output_dir=tmp_path, pipeline=("deduplication",))
    now = describe_run(config, [])
    before = copy.deepcopy(now)
    stored = before["config"]
    stored["earlier"], stored["piece_size"] = stored.pop("previous_runs"), stored.pop("work_unit_size")
    for stage in STAGES:
        stored[stage]["alarm"] = stored[stage].pop("max_drop_warning")
    stored["deduplication"]["kept_threshold"] = stored["deduplication"].pop("cluster_threshold")
    check_same_run(before, now, tmp_path, "start anew")
    stored["piece_size"] = 1
    with pytest.raises(DataError, match="began with another work_unit_size: 1, now 33554432"):
        check_same_run(before, now, tmp_path, "start anew")


@pytest.mark.parametrize(("former", "present"), [("bfloat16", "bf16"), ("float32", "fp32"), ("bf16", "bf16")])
def test_former_spellings_of_precisions_are_read(former: str, present: str) -> None:
    """So a run resumes from a checkpoint whose config has the former spelling, without a change to log."""
    assert ParallelConfig(precision=former).precision == present  # type: ignore[arg-type]


def test_an_unknown_precision_lists_the_present_spellings() -> None:
    with pytest.raises(ValidationError, match="'bf16'"):
        ParallelConfig(precision="bf8")  # type: ignore[arg-type]

"""Every benchmark reports a mistake as `dsv3` does, and one that measures a GPU says that it needs one."""

import re
import sys

import pytest
import torch

from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import calibrate_planner
import interop
import multi_gpu
import step_profile


def test_no_script_shows_a_traceback_for_a_mistake() -> None:
    """`typer.run` prints a traceback for every error; `run_command` prints a line for those of the user."""
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    assert [path.name for path in scripts if re.search(r"\btyper\.run\(", path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("script", ["calibrate_planner", "interop", "multi_gpu", "step_profile"])
def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begin = {
        "calibrate_planner": calibrate_planner.main,
        "interop": interop.main,
        "multi_gpu": lambda: multi_gpu.main("none"),
        "step_profile": lambda: step_profile.main(ROOT / "none.json"),
    }
    with pytest.raises(ConfigError, match="this benchmark measures a GPU, and torch finds no CUDA device here"):
        begin[script]()

"""The device, the library versions and the commit with which a benchmark was measured."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from os import cpu_count
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(*packages: str, commit: str | None = None) -> dict[str, object]:
    """The first fields of a result file. Give `commit` where the code was copied without its Git history."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit or _git("rev-parse", "HEAD"),
        "uncommitted": commit is None and _git("status", "--porcelain", "--", "src", "benchmarks/*.py") != "",
    }


def cpu_name() -> str:
    """Model and number of cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.processor())
    return f"{model}, {cpu_count()} cores"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()

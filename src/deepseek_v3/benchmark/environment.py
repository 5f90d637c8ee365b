"""The device, the library versions and the commit with which something was measured."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path

import torch

_CHECKOUT = Path(__file__).parents[3]


def environment(*packages: str, commit: str | None = None) -> dict[str, object]:
    """The first fields of a result file. Give `commit` where the code was copied without its Git history.

    A package that is not installed has no version. `commit` is null outside of a checkout, and `uncommitted` says
    whether the measured code differs from it.
    """
    return {
        "device": device_name(),
        "versions": {"python": platform.python_version(), **_versions(packages)},
        "commit": commit or _git("rev-parse", "HEAD"),
        "uncommitted": commit is None and bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
    }


def device_name() -> str:
    """The GPU's name by its driver; without a GPU the model and number of cores of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """Model and number of cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.processor())
    return f"{model}, {cpu_count()} cores"


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    """What Git prints about the checkout; None if this is none, or if there is no Git."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        run = subprocess.run(["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True)  # noqa: S603, S607
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None

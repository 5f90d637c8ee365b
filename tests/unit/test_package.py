"""The installed package: its files, and its commands outside the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v3 import __version__
from helpers import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packages that a wheel would install, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder / "installed")]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    for name in ("src", "configs"):
        shutil.rmtree(folder / name)
    return folder / "installed"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m deepseek_v3` of the installed package in an empty folder."""
    command = [sys.executable, "-m", "deepseek_v3", *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_wheel_holds_every_module_and_every_config(installed: Path) -> None:
    source, found = ROOT / "src" / "deepseek_v3", installed / "deepseek_v3"
    for pattern in ("*.py", "*.json", "*.yaml", "*.typed", "*.cu", "*.cuh", "*.html", "*.css", "*.js"):
        wanted = {path.relative_to(source) for path in source.rglob(pattern) if not path.is_symlink()}
        assert wanted <= {path.relative_to(found) for path in found.rglob(pattern)}
    shipped = {path.name: path.read_bytes() for path in (ROOT / "configs").iterdir()}
    assert {path.name: path.read_bytes() for path in (found / "configs").iterdir()} == shipped
    assert [path.name for path in installed.iterdir()] == ["deepseek_v3"]


def test_the_installed_package_knows_its_version_and_configs(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version").stdout == f"deepseek_v3 {__version__}\n"
    shown = run(installed, tmp_path, "config", "show", "1b")
    assert (shown.returncode, shown.stdout.splitlines()[1]) == (0, "  vocab_size: 129280")
    plan = run(installed, tmp_path, "plan", "--gpus", "2", "--config", "1b")
    assert "torchrun --nproc_per_node=2 -m deepseek_v3 train --config 1b" in plan.stdout
    assert run(installed, tmp_path, "validate").stdout.splitlines()[-1] == "7 of 7 configurations comply"
    assert not list(tmp_path.iterdir())

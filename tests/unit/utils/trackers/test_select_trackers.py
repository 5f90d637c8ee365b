"""The names in logging.trackers: own trackers, those of other packages, and missing libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.optional import is_installed
from deepseek_v3.utils.trackers import select_trackers
from deepseek_v3.utils.trackers.mlflow_tracker import MlflowTracker
from deepseek_v3.utils.trackers.select_trackers import check_trackers, make_tracker, register_tracker

PACKAGE = """
from deepseek_v3.utils.trackers.tracker import RemoteRun, Tracker

class Notebook(Tracker):
    def start(self, run):
        return RemoteRun("1", "project", "name", "place")
    def log_scalars(self, step, scalars): pass
    def finish(self, status): pass
"""
ENTRY_POINTS = """
[deepseek_v3.trackers]
notebook = notebook_package:Notebook
text = notebook_package:PACKAGE
other = notebook_package:RemoteRun
"""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_trackers, "_registered", {})


@pytest.mark.parametrize(
    ("name", "library", "uri"),
    [
        ("wandb", "wandb", ""),
        ("trackio", "trackio", ""),
        ("mlflow", "mlflow", "http://host"),
        ("mlflow", "sqlalchemy", ""),
        ("mlflow", "alembic", ""),
    ],
)
def test_a_missing_library_is_refused_with_the_pip_line(
    name: str, library: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for other in ("wandb", "trackio", "mlflow", "sqlalchemy", "alembic"):
        monkeypatch.setitem(sys.modules, other, sys)  # stands for an installed library
    check_trackers([name])
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError) as error:
        check_trackers([name])
    assert str(error.value) == (
        f"logging.trackers: {name} needs {library}; run `pip install 'deepseek_v3[{name}]'`, "
        "or remove it from the list"
    )


def test_a_server_of_mlflow_needs_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", sys)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    check_trackers(["mlflow"])


def test_a_folder_named_like_a_library_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_tracker").mkdir()  # as wandb leaves a folder wandb behind
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("no_such_tracker")
    assert not is_installed("no_such_library")
    assert is_installed("pytest")


def test_unknown_names_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        check_trackers(["wand"])
    assert str(error.value) == (
        "logging.trackers: wand: there is no tracker of this name; known: mlflow, trackio, wandb; install the "
        "package that provides it, or remove the name"
    )
    with pytest.raises(ConfigError, match=r"TensorBoard is written by logging\.tensorboard: true"):
        check_trackers(["tensorboard"])


def test_a_name_is_registered_once() -> None:
    register_tracker("mine", MlflowTracker)
    register_tracker("mine", MlflowTracker)
    assert isinstance(make_tracker("mine"), MlflowTracker)
    for name in ("mine", "wandb", "tensorboard"):
        with pytest.raises(ValueError, match="the name is taken"):
            register_tracker(name, lambda: MlflowTracker())


def test_entry_points_of_an_installed_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebook_package.py").write_text(PACKAGE + "PACKAGE = 'text'\n")
    information = tmp_path / "notebook_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: notebook-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    check_trackers(["notebook"])
    assert isinstance(make_tracker("notebook"), sys.modules["notebook_package"].Notebook)
    for name in ("text", "other"):
        with pytest.raises(ConfigError, match=rf"logging.trackers: {name}: the entry point .* is not a subclass"):
            check_trackers([name])

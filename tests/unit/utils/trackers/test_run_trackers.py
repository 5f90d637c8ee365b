"""The trackers of a run together: trackers.json, resuming, and one deadline for all."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_v3.utils.trackers import select_trackers
from deepseek_v3.utils.trackers.background import BackgroundTracker
from deepseek_v3.utils.trackers.run_trackers import RunTrackers
from deepseek_v3.utils.trackers.select_trackers import register_tracker
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Tracker


class Numbering(Tracker):
    """Gives its runs the ids 1, 2, …, and continues any previous run of the same project."""

    started: list[RemoteRun]

    def start(self, run: TrackedRun) -> RemoteRun:
        project = run.project_or("NUMBERING_PROJECT")
        previous = run.previous_in(project)
        number = previous.id if previous else str(len(self.started) + 1)
        name = run.name_or("NUMBERING_NAME")
        self.started.append(RemoteRun(number, project, name, f"see {number}", continued=previous is not None))
        return self.started[-1]

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def finish(self, status: Status) -> None:
        pass


class Hanging(Numbering):
    end = threading.Event()

    def finish(self, _status: Status) -> None:
        self.end.wait()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(select_trackers, "_registered", {})
    monkeypatch.setattr(Numbering, "started", [], raising=False)
    monkeypatch.setattr(Hanging, "end", threading.Event())
    register_tracker("numbering", Numbering)
    register_tracker("hanging", Hanging)
    yield
    Hanging.end.set()


def run_in(folder: Path, project: str | None = None, name: str | None = None) -> TrackedRun:
    return TrackedRun(folder, project, name, f"{folder.name}-today", {"training.seed": 0})


def track(run: TrackedRun, *, resumes: bool, names: tuple[str, ...] = ("numbering",)) -> RemoteRun:
    RunTrackers(names, run, resumes=resumes).close(Status.FINISHED)
    return Numbering.started[-1]


def test_a_resumed_run_continues_the_one_in_trackers_json(tmp_path: Path) -> None:
    assert track(run_in(tmp_path), resumes=False).name == f"{tmp_path.name}-today"
    written = {"id": "1", "project": "deepseek_v3", "name": f"{tmp_path.name}-today", "place": "see 1"}
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"numbering": written}
    later = replace(run_in(tmp_path), default_name="tomorrow")
    resumed = track(later, resumes=True)
    assert (resumed.id, resumed.name, resumed.continued) == ("1", written["name"], True)
    assert [path.name for path in tmp_path.iterdir()] == ["trackers.json"]


def test_a_new_run_in_the_same_folder_has_a_new_id(tmp_path: Path) -> None:
    track(run_in(tmp_path), resumes=False)
    assert track(run_in(tmp_path), resumes=False).id == "2"
    RunTrackers((), run_in(tmp_path), resumes=False).close(Status.FINISHED)
    assert not (tmp_path / "trackers.json").exists()


def test_another_project_begins_a_new_run_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    track(run_in(tmp_path, "first"), resumes=False)
    assert track(run_in(tmp_path, "second"), resumes=True).id == "2"
    assert (
        "numbering: cannot continue the run 1 of the project first; 2 of second holds the steps from here on"
        in caplog.messages
    )


def test_the_config_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBERING_PROJECT", "of the environment")
    monkeypatch.setenv("NUMBERING_NAME", "of the environment too")
    found = track(run_in(tmp_path), resumes=False)
    assert (found.project, found.name) == ("of the environment", "of the environment too")
    found = track(run_in(tmp_path, "project", "name"), resumes=False)
    assert (found.project, found.name) == ("project", "name")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"numbering": 3}', '{"numbering": {"id": 3}}', "\xff"])
def test_a_damaged_file_begins_new_runs(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trackers.json").write_text(content, encoding="latin-1")
    assert track(run_in(tmp_path), resumes=True).id == "1"
    assert any(message.startswith(f"{tmp_path / 'trackers.json'}: cannot be used") for message in caplog.messages)


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trackers.json").mkdir()
    track(run_in(tmp_path), resumes=False)
    assert any("trackers.json: cannot be written" in message for message in caplog.messages)
    assert not any("records are missing" in message for message in caplog.messages)


def test_all_trackers_share_one_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        register_tracker(f"hanging{number}", Hanging)
    names = ("hanging0", "numbering", "hanging1", "hanging2")
    deadlines: list[float] = []
    wait = BackgroundTracker.wait
    monkeypatch.setattr(BackgroundTracker, "wait", lambda self, end: (deadlines.append(end), wait(self, end)))
    trackers = RunTrackers(names, run_in(tmp_path), resumes=False, seconds=0.5)
    trackers.close(Status.FAILED)
    trackers.close(Status.FINISHED)  # a second call does nothing
    assert len(deadlines) == 4
    assert len(set(deadlines)) == 1
    assert sorted(json.loads((tmp_path / "trackers.json").read_text())) == sorted(names)

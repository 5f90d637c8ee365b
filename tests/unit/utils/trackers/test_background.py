"""A tracker on its thread: whatever its library does, the run goes on, and what is missing is counted."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from deepseek_v3.utils.trackers.background import BackgroundTracker
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Tracker, scalars

SOON = 0.2  # seconds


class FakeTracker(Tracker):
    """Records its calls; `faults` are called at the start of the method that they are named after."""

    def __init__(self, **faults: Callable[[], object]) -> None:
        self.faults, self.calls = faults, []  # type: ignore[var-annotated]

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        self.faults.get(str(call[0]), lambda: None)()

    def start(self, run: TrackedRun) -> RemoteRun:
        self._call("start", run.name)
        return RemoteRun("id1", "project", run.name_or("NO_SUCH_VARIABLE"), "look here")

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._call("log", step, scalars)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._call("text", step, name, text)

    def finish(self, status: Status) -> None:
        self._call("finish", status)


@pytest.fixture
def hang() -> Iterator[Callable[[], object]]:
    """A fault that waits until the test is over."""
    over = threading.Event()
    yield over.wait
    over.set()


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def begin(tracker: Tracker, capacity: int = 100) -> BackgroundTracker:
    run = TrackedRun(Path("/run"), None, "name", "folder-1", {})
    return BackgroundTracker("fake", tracker, run, lambda _remote: None, capacity)


def end(background: BackgroundTracker, seconds: float = 60.0, status: Status = Status.FINISHED) -> None:
    """Closes the tracker and waits for it, as a run does."""
    background.close(status)
    background.wait(time.monotonic() + seconds)


def raises(error: BaseException) -> Callable[[], object]:
    def fault() -> None:
        raise error

    return fault


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("status", list(Status))
def test_calls_arrive_in_order(status: Status, caplog: pytest.LogCaptureFixture) -> None:
    tracker = FakeTracker()
    background = begin(tracker)
    values: dict[str, float | list[float] | None] = {"loss": 2.5, "load": [0.5, math.nan], "none": None}
    background.log_scalars(1, values)
    values["loss"] = 0.0  # the caller's own from here on
    background.log_text(1, "samples/00", "text")
    background.log_scalars(2, {"loss": math.inf})
    end(background, status=status)
    start, first, *others = tracker.calls
    assert start == ("start", "name")
    assert first[:2] == ("log", 1)
    assert first[2] == pytest.approx({"loss": 2.5, "load/layer_00": 0.5, "load/layer_01": math.nan}, nan_ok=True)
    assert others == [("text", 1, "samples/00", "text"), ("log", 2, {"loss": math.inf}), ("finish", status)]
    assert warnings_of(caplog) == []
    assert caplog.messages == ["fake: look here", "fake: look here"]


def test_lists_have_one_scalar_per_layer() -> None:
    assert scalars({"a": [1.0, 2.0], "b": 3, "c": [], "d": None}) == {"a/layer_00": 1.0, "a/layer_01": 2.0, "b": 3}


@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(3), KeyboardInterrupt()])
def test_a_start_that_fails_drops_all_records(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    tracker = FakeTracker(start=raises(error))
    background = begin(tracker)
    for step in range(5):
        background.log_scalars(step, {"loss": 1.0})
    end(background)
    assert tracker.calls == [("start", "name")]
    failed, missing = warnings_of(caplog)
    assert failed.startswith(f"fake: start failed: {type(error).__name__}")
    assert missing == "fake: 5 of 5 records are missing there; metrics.jsonl has them all"


def test_a_start_that_hangs_ends_no_run(hang: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    background = begin(FakeTracker(start=hang), capacity=3)
    for step in range(1000):
        background.log_scalars(step, {"loss": 1.0})
    end(background, SOON)
    assert warnings_of(caplog) == [
        "fake: its start takes too long; the run ends without it",
        "fake: 1,000 of 1,000 records are missing there; metrics.jsonl has them all",
    ]


def test_a_log_that_raises_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = FakeTracker(log=raises(ValueError("bad\n  name")))
    background = begin(tracker)
    for step in range(4):
        background.log_scalars(step, {"loss": 1.0})
    background.log_text(4, "text", "this one arrives")
    end(background)
    assert [call[0] for call in tracker.calls] == ["start", "log", "log", "log", "log", "text", "finish"]
    assert warnings_of(caplog) == [
        "fake: log failed: ValueError: bad name; training continues, see metrics.jsonl",
        "fake: 4 of 5 records are missing there; metrics.jsonl has them all",
    ]


def test_a_full_queue_drops_records_and_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    busy, go_on = threading.Event(), threading.Event()
    tracker = FakeTracker(log=lambda: (busy.set(), go_on.wait()))
    background = begin(tracker, capacity=3)
    background.log_scalars(0, {})
    assert busy.wait(5)
    for step in range(1, 11):
        background.log_scalars(step, {})
    go_on.set()
    end(background)
    assert [call[1] for call in tracker.calls if call[0] == "log"] == [0, 1, 2, 3]
    assert warnings_of(caplog) == ["fake: 7 of 11 records are missing there; metrics.jsonl has them all"]


def test_a_log_that_blocks_ends_no_run(hang: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    background = begin(FakeTracker(log=hang))
    for step in range(3):
        background.log_scalars(step, {})
    end(background, SOON)
    slow, missing = warnings_of(caplog)
    assert slow == "fake: its log takes too long; the run ends without it; look here"
    assert missing.endswith("of 3 records are missing there; metrics.jsonl has them all")


def test_a_finish_that_hangs_ends_no_run(hang: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    background = begin(FakeTracker(finish=hang))
    background.log_scalars(1, {})
    end(background, SOON)
    assert warnings_of(caplog) == ["fake: its finish takes too long; the run ends without it; look here"]


def test_a_finish_that_raises_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    end(begin(FakeTracker(finish=raises(RuntimeError()))))
    assert warnings_of(caplog) == ["fake: finish failed: RuntimeError; training continues, see metrics.jsonl"]


def test_messages_of_libraries_hold_no_secrets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter22@host/")
    error = OSError("key 0123456789abcdef, user hunter22 at https://me:hunter22@host/ " + "x" * 1000)
    end(begin(FakeTracker(start=raises(error))))
    (message,) = warnings_of(caplog)
    assert "0123456789abcdef" not in message
    assert "hunter22" not in message
    assert len(message) < 600

"""All trackers of a run, and the file that remembers which runs they continue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value
from deepseek_v3.utils.trackers.background import BackgroundTracker
from deepseek_v3.utils.trackers.select_trackers import make_tracker
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Values

FINISH_SECONDS = 8.0
_log = get_logger("Trackers")


class RunTrackers:
    """Starts the trackers of a run and passes records to them. No method raises, and only `close` waits.

    `names`: those of `logging.trackers`, checked by `check_trackers`. `resumes`: whether the run continues that of
    a previous process in the same folder; each tracker then continues its run there, if its library can.
    `seconds`: how long `close` waits for all trackers together.
    """

    def __init__(
        self, names: Sequence[str], run: TrackedRun, *, resumes: bool, seconds: float = FINISH_SECONDS
    ) -> None:
        self._seconds = seconds
        ids = _RunIds(run.folder / "trackers.json", resumes)
        self._trackers = [
            BackgroundTracker(
                name, make_tracker(name), _with_previous(run, ids.find(name)), partial(ids.keep, name)
            )
            for name in names
        ]

    def log_scalars(self, step: int, values: Values) -> None:
        """Passes the metrics of a step on; lists have one value per layer."""
        for tracker in self._trackers:
            tracker.log_scalars(step, values)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Passes a text that the model has written on."""
        for tracker in self._trackers:
            tracker.log_text(step, name, text)

    def close(self, status: Status) -> None:
        """Finishes the runs there, and logs where they are shown. A second call does nothing."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close(status)
        deadline = time.monotonic() + self._seconds
        for tracker in trackers:
            tracker.wait(deadline)


def _with_previous(run: TrackedRun, previous: RemoteRun | None) -> TrackedRun:
    return replace(run, previous=previous, default_name=previous.name if previous else run.default_name)


class _RunIds:
    """The runs of all trackers in `trackers.json`; a new run begins without any."""

    def __init__(self, path: Path, resumes: bool) -> None:
        self._path, self._lock = path, threading.Lock()
        self._runs: dict[str, RemoteRun] = {}
        try:
            if resumes:
                self._runs = {name: _remote_run(entry) for name, entry in _read(path).items()}
            else:
                path.unlink(missing_ok=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning(f"{path}: cannot be used: {error}; the trackers begin new runs")

    def find(self, name: str) -> RemoteRun | None:
        return self._runs.get(name)

    def keep(self, name: str, run: RemoteRun) -> None:
        """Writes the run of a tracker to the file, or warns that it cannot be written."""
        with self._lock:
            self._runs[name] = run
            entries = {known: asdict(self._runs[known]) for known in sorted(self._runs)}
            for entry in entries.values():
                del entry["continued"]
            try:
                with atomic_write(self._path) as path:
                    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                _log.warning(
                    f"{self._path}: cannot be written: {error.strerror}; a resumed run begins a new run of {name}"
                )


def _read(path: Path) -> Mapping[str, Any]:
    entries: Mapping[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return entries


def _remote_run(entry: Mapping[str, str]) -> RemoteRun:
    """Raises TypeError or ValueError for an entry that `keep` has not written."""
    texts = [entry.get(field) for field in ("id", "project", "name", "place")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"found {format_value(entry)}, expected id, project, name and place")
    run_id, project, name, place = map(str, texts)
    return RemoteRun(run_id, project, name, place)

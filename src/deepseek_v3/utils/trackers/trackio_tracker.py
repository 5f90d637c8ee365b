"""Trackio (https://huggingface.co/docs/trackio): a local database and dashboard, or a Hugging Face Space."""

from __future__ import annotations

import os
import shlex
from typing import Any

from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.trackers.tracker import RemoteRun, Scalars, Status, TrackedRun, Tracker


class TrackioTracker(Tracker):
    """Logs to trackio's database, in its cache folder or in TRACKIO_DIR; to TRACKIO_SPACE_ID or TRACKIO_SERVER_URL
    if one is set.

    Trackio finds a run by its name. If another run of the project has taken the name since, a resumed run begins a
    new one. Steps that are run again appear twice. Trackio knows no status.
    """

    _run: Any

    def start(self, run: TrackedRun) -> RemoteRun:
        """Starts or continues a run."""
        project = run.project_or("TRACKIO_PROJECT")
        previous = run.previous_in(project)
        self._run = self._continue(run, previous) if previous else None
        continued = self._run is not None
        if self._run is None:
            self._run = _init(run, project, run.name_or("TRACKIO_NAME"), "never")
        return RemoteRun(
            id=self._run.id, project=project, name=self._run.name, place=_place(project), continued=continued
        )

    def _continue(self, run: TrackedRun, previous: RemoteRun) -> Any:
        """The previous run; None if it is gone, or if its name now means another one."""
        try:
            found = _init(run, previous.project, previous.name, "must")
        except ValueError:  # there is no run of this name
            return None
        if found.id == previous.id:
            return found
        found.finish()
        return None

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs values of a step."""
        self._run.log(dict(scalars), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs a text as Markdown code, which keeps its line breaks."""
        import trackio

        self._run.log({name: trackio.Markdown(f"~~~~\n{text}\n~~~~")}, step=step)

    def finish(self, status: Status) -> None:  # noqa: ARG002 -- trackio has none
        """Waits until all records are stored."""
        self._run.finish()


def _init(run: TrackedRun, project: str, name: str, resume: str) -> Any:
    import trackio

    return trackio.init(project=project, name=name, config=dict(run.config), resume=resume, embed=False)


def _place(project: str) -> str:
    if space := os.environ.get("TRACKIO_SPACE_ID"):
        return f"https://huggingface.co/spaces/{space}"
    if server := os.environ.get("TRACKIO_SERVER_URL"):
        return redact(server)
    return f"open it with: trackio show --project {shlex.quote(project)}"

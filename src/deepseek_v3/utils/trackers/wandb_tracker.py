"""Weights & Biases (https://docs.wandb.ai): online with a key, otherwise into files of the run's folder."""

from __future__ import annotations

import html
import netrc
import os
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.trackers.tracker import RemoteRun, Scalars, Status, TrackedRun, Tracker

# 255 is the code that W&B shows as killed.
_EXIT_CODES = {Status.FINISHED: 0, Status.STOPPED: 255, Status.FAILED: 1}


class WandbTracker(Tracker):
    """Logs to Weights & Biases, with its environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_DIR, …).

    Without WANDB_MODE it works online if there is a key in WANDB_API_KEY or in the netrc file of `wandb login`, and
    offline otherwise. A resumed run keeps its id; W&B keeps the first values of a step that is run again.
    """

    _run: Any

    def start(self, run: TrackedRun) -> RemoteRun:
        """Starts or continues a run. Raises ValueError if WANDB_MODE is online and there is no key."""
        mode: Any = _mode()  # which the library itself checks
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import: no network without a key
        import wandb

        project = run.project_or("WANDB_PROJECT")
        previous = run.previous_in(project)
        hooks = sys.excepthook, sys.exit
        try:
            self._run = wandb.init(
                project=project,
                name=run.name_or("WANDB_NAME"),
                id=previous.id if previous else os.environ.get("WANDB_RUN_ID"),
                resume="allow" if previous else None,
                mode=mode,
                dir=os.environ.get("WANDB_DIR") or run.folder,
                config=dict(run.config),
                reinit="create_new",  # a run of the calling program stays as it is
                settings=wandb.Settings(console="off", silent=True),
            )
        finally:
            sys.excepthook, sys.exit = hooks  # its own would print tracebacks twice, once without redaction
        return RemoteRun(
            id=self._run.id,
            project=project,
            name=self._run.name or run.default_name,
            place=self._place(),
            continued=previous is not None and self._run.id == previous.id,
        )

    def _place(self) -> str:
        if self._run.disabled:
            return "WANDB_MODE is disabled, so nothing is kept"
        if self._run.offline:
            return f"offline; upload it with: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        return redact(str(self._run.url))

    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Adds values to a step, unless a later step has been logged, to which W&B cannot return."""
        if step >= self._run.step:
            self._run.log(dict(scalars), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Adds a text to a step as HTML with the same line breaks."""
        import wandb

        if step >= self._run.step:
            self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def finish(self, status: Status) -> None:
        """Uploads what is left, or closes the files of an offline run."""
        self._run.finish(exit_code=_EXIT_CODES[status])


def _mode() -> str | None:
    """The mode of `wandb.init`; None, which is online unless `wandb offline` says otherwise, if there is a key."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("online", "run", "shared") and not _has_key():
        raise ValueError(f"WANDB_MODE is {mode}, and there is no key; run `wandb login`, or set WANDB_API_KEY")
    return mode or (None if _has_key() else "offline")


def _has_key() -> bool:
    """Whether W&B would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(_netrc_has(file.expanduser(), host) for file in files)


def _netrc_has(file: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False

"""The interface of an experiment tracker, such as Weights & Biases.

Every method of a tracker is called on one thread of its own, in this order: `start`, then `log_scalars` and
`log_text` in the order of the run, then `finish`. A method may therefore wait for a network, and may raise any
error: `background.py` keeps both away from the run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

DEFAULT_PROJECT = "deepseek_v3"

Scalars = Mapping[str, float]
Values = Mapping[str, float | list[float] | None]


class Status(Enum):
    """How a run ended: the token budget is used up, a signal stopped it, or an error ended it."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class RemoteRun:
    """A run as a tracker knows it. `trackers.json` of the run's folder keeps it, so that a resumed run finds it.

    `place`: the address where the run is shown, or the command that shows or uploads it. It holds no secret.
    `continued`: whether `start` continued the run of a previous process.
    """

    id: str
    project: str
    name: str
    place: str
    continued: bool = False


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    `folder` is absolute and exists. `project` and `name` are those of the config, None if it leaves them open.
    `config` has one entry per field, by dotted name, and no secrets. `previous` is the run to continue, if this
    process resumes one that had this tracker.
    """

    folder: Path
    project: str | None
    name: str | None
    default_name: str
    config: Mapping[str, str | float | bool | None]
    previous: RemoteRun | None = None

    def project_or(self, variable: str) -> str:
        """The project of the config, else that of an environment variable of the library, else `deepseek_v3`."""
        return self.project or os.environ.get(variable) or DEFAULT_PROJECT

    def name_or(self, variable: str) -> str:
        """The name of the config, else that of an environment variable of the library, else `default_name`."""
        return self.name or os.environ.get(variable) or self.default_name

    def previous_in(self, project: str) -> RemoteRun | None:
        """The run to continue, if it is in this project."""
        return self.previous if self.previous is not None and self.previous.project == project else None


class Tracker(ABC):
    """A place outside the run's folder that shows metrics, such as Weights & Biases."""

    @abstractmethod
    def start(self, run: TrackedRun) -> RemoteRun:
        """Starts or continues a run there. Must not ask anything on the terminal."""

    @abstractmethod
    def log_scalars(self, step: int, scalars: Scalars) -> None:
        """Logs values of a step; NaN and infinity are possible. One step may come in several calls."""

    def log_text(self, step: int, name: str, text: str) -> None:  # noqa: B027 -- not every tracker has texts
        """Logs a text that the model has written. A tracker without texts leaves this out."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Ends the run there, and returns when its records have arrived."""


def scalars(values: Values) -> dict[str, float]:
    """One number per name: a list, which has one value per layer, becomes `name/layer_00` and so on.

    None, for a value that does not exist, is left out.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        entries = (
            {f"{name}/layer_{layer:02d}": entry for layer, entry in enumerate(value)}
            if isinstance(value, list)
            else {name: value}
        )
        found |= {key: entry for key, entry in entries.items() if entry is not None}
    return found

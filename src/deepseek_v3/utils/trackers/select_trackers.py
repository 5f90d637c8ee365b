"""The trackers that `logging.trackers` may name: three of this package, and those of other packages.

A package offers a tracker in its `pyproject.toml`; the name on the left is the one that `logging.trackers` uses:

    [project.entry-points."deepseek_v3.trackers"]
    notebook = "my_package.notebook:NotebookTracker"

where `NotebookTracker` is a subclass of `Tracker` of `tracker.py`, whose constructor takes no arguments. A Python
program may call `register_tracker("notebook", NotebookTracker)` instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from deepseek_v3.utils.entry_points import entry_point_names, load_entry_point
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.optional import is_installed, missing_library
from deepseek_v3.utils.trackers.mlflow_tracker import MlflowTracker
from deepseek_v3.utils.trackers.tracker import Tracker
from deepseek_v3.utils.trackers.trackio_tracker import TrackioTracker
from deepseek_v3.utils.trackers.wandb_tracker import WandbTracker

ENTRY_POINT_GROUP = "deepseek_v3.trackers"
_OWN: dict[str, Callable[[], Tracker]] = {
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}
_registered: dict[str, Callable[[], Tracker]] = {}


def register_tracker(name: str, make: Callable[[], Tracker]) -> None:
    """Adds a tracker for this process. Raises ValueError if the name belongs to another one."""
    if name == "tensorboard" or {**_OWN, **_registered}.get(name, make) is not make:
        raise ValueError(f"tracker {name!r}: the name is taken; choose another")
    _registered[name] = make


def make_tracker(name: str) -> Tracker:
    """The tracker that `logging.trackers` names, not started. Imports no library of a tracker of this package.

    Raises ConfigError for an unknown name, for one that several packages offer, and for an entry point that cannot
    be loaded or is not a tracker.
    """
    known = {**_OWN, **_registered}
    if name in known:
        return known[name]()
    field, offered = f"logging.trackers: {name}", entry_point_names(ENTRY_POINT_GROUP)
    if name not in offered:
        raise ConfigError(
            f"{field}: there is no tracker of this name; known: {', '.join(sorted({*known, *offered}))}; "
            + (
                "TensorBoard is written by logging.tensorboard: true"
                if name == "tensorboard"
                else "install the package that provides it, or remove the name"
            )
        )
    make, entry_point = load_entry_point(ENTRY_POINT_GROUP, name, field)
    if not (isinstance(make, type) and issubclass(make, Tracker)):
        raise ConfigError(f"{entry_point} is not a subclass of Tracker")
    return make()


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker of this package cannot be found, or lacks a library that it needs."""
    for name in names:
        make_tracker(name)
        for library in _libraries(name):
            if not is_installed(library):
                raise ConfigError(missing_library(f"logging.trackers: {name}", library, "remove it from the list"))


def _libraries(name: str) -> tuple[str, ...]:
    """Import names of the libraries that a tracker of this package needs."""
    if name == "mlflow":
        return ("mlflow",) if os.environ.get("MLFLOW_TRACKING_URI") else ("mlflow", "sqlalchemy", "alembic")
    return (name,) if name in _OWN else ()

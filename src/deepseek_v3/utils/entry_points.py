"""Objects that other packages offer as entry points, such as filters of the data pipeline and loss terms."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from deepseek_v3.utils.errors import ConfigError


def entry_point_names(group: str) -> set[str]:
    """The names that installed packages offer in a group of entry points. Loads none of them."""
    return {point.name for point in entry_points(group=group)}


def load_entry_point(group: str, name: str, place: str) -> tuple[Any, str]:
    """Loads the object that a package offers under `name`; returns it with a description of the entry point.

    `place` begins every message: what the name stands for, or the field that holds it. The name must be one of
    `entry_point_names`. Raises ConfigError if several packages offer it, or if it cannot be loaded.
    """
    points = list(entry_points(group=group, name=name))
    if len(points) > 1:
        offers = ", ".join(sorted(point.value for point in points))
        raise ConfigError(f"{place}: several packages offer it ({offers}); uninstall all but one")
    (point,) = points
    described = f"{place}: the entry point {point.value} of the group {group}"
    try:
        return point.load(), described
    except Exception as error:
        raise ConfigError(
            f"{described} cannot be loaded: {type(error).__name__}: {error}; fix the package that provides it, or "
            "do without it"
        ) from error

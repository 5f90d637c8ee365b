"""Stages of the data pipeline that other packages add.

A package offers a stage in its `pyproject.toml`; the name on the left is the one that `pipeline` uses:

    [project.entry-points."deepseek_v3.filters"]
    toxicity = "my_package.filters:TOXICITY"

where `my_package/filters.py` holds

    class ToxicityConfig(StageConfig):
        limit: Fraction = 0.5

    def load() -> type[Stage]:  # imports heavy libraries only when the pipeline runs
        from my_package.toxicity import ToxicityFilter
        return ToxicityFilter

    TOXICITY = FilterExtension("toxicity", ToxicityConfig, load)

A Python program may call `register_filter(TOXICITY)` instead. The YAML section `toxicity:` is then checked by
`ToxicityConfig`, and the pipeline calls the loaded class with the fields of that section as keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from deepseek_v3.config.base import StageConfig
from deepseek_v3.utils.entry_points import entry_point_names, load_entry_point
from deepseek_v3.utils.errors import ConfigError

ENTRY_POINT_GROUP = "deepseek_v3.filters"


@dataclass(frozen=True)
class FilterExtension:
    """A stage from another package: its name in `pipeline`, the class of its options, and how to load the stage.

    `load` returns the stage's class, a subclass of `Stage` or `GlobalStage` of `deepseek_v3.data.stages`.
    """

    name: str
    options: type[StageConfig]
    load: Callable[[], Callable[..., Any]]


_registered: dict[str, FilterExtension] = {}
_reserved: set[str] = set()


def register_filter(extension: FilterExtension) -> None:
    """Adds a stage for this process. Raises ValueError if its name is not an identifier, or is taken."""
    name = extension.name
    if not name.isidentifier():
        raise ValueError(f"filter {name!r}: expected a name of letters, digits and underscores")
    if name in _reserved or _registered.get(name, extension) != extension:
        raise ValueError(f"filter {name!r}: the name is taken; choose another")
    _registered[name] = extension


def reserve_names(names: Iterable[str]) -> None:
    """Keeps names for the fields of the pipeline's own configuration."""
    _reserved.update(names)


def filter_names() -> list[str]:
    """The names of all stages that other packages add, sorted."""
    return sorted(({*_registered} | entry_point_names(ENTRY_POINT_GROUP)) - _reserved)


def find_filter(name: str) -> FilterExtension | None:
    """The stage that other packages add under a name; None if there is none.

    Raises ConfigError if several packages offer it, or if its package cannot be loaded.
    """
    if name in _registered:
        return _registered[name]
    if name in _reserved:
        return None
    if name not in entry_point_names(ENTRY_POINT_GROUP):
        return None
    extension, entry_point = load_entry_point(ENTRY_POINT_GROUP, name, f"filter {name}")
    if not isinstance(extension, FilterExtension) or extension.name != name:
        raise ConfigError(f"{entry_point} is {extension!r}, expected a FilterExtension with the name {name}")
    return extension

"""Things named by their place, `package.module:name`, and imported when they are wanted."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(place: str) -> Any:
    """What stands at `package.module:name`."""
    module, name = place.split(":")
    return getattr(import_module(module), name)

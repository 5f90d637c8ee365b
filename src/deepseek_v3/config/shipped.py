"""The configs that ship with the project, and the short names they go by."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "deepseek_v3_"
PATTERN = f"{PREFIX}*.yaml"
FOLDER = Path("configs")

# Where an installed package has them, and where a checkout has them.
_PLACES = (Path(__file__).parents[1] / FOLDER, Path(__file__).parents[3] / FOLDER)


def shipped_folder() -> Path:
    """The folder of the shipped configs."""
    return next((place for place in _PLACES if place.is_dir()), FOLDER)


def is_name(path: Path) -> bool:
    """Whether a path may be the name of a shipped config: a bare one, or one in `configs`."""
    return path.parent in (Path(), FOLDER)


def find_config(path: str | Path) -> Path:
    """The file that `path` means: a file as it is, or else the shipped config of that name.

    Shipped are `deepseek_v3_1b` or `1b`, with or without `configs/` in front and `.yaml` behind, `data_config` and
    `deepspeed_config.json`. What is neither is returned as it is.
    """
    path = Path(path)
    if os.path.isfile(path) or not is_name(path):  # noqa: PTH113 -- False for names too long
        return path
    folder = shipped_folder()
    names = [path.name] if path.suffix else [f"{path.name}.yaml", f"{PREFIX}{path.name}.yaml"]
    return next((folder / name for name in names if os.path.isfile(folder / name)), path)  # noqa: PTH113 -- likewise


def shown_config(path: Path) -> str:
    """The shortest words that `find_config` takes for `path` from any folder."""
    if path.is_absolute() and path.parent == shipped_folder():
        return path.stem.removeprefix(PREFIX) if path.suffix == ".yaml" else path.name
    return str(path)


def shipped_names() -> list[str]:
    """The short names of the shipped YAML files."""
    return sorted(path.stem.removeprefix(PREFIX) for path in shipped_folder().glob("*.yaml"))

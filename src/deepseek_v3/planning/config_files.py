"""The model sizes of a folder."""

from __future__ import annotations

from pathlib import Path

from deepseek_v3.utils.errors import ConfigError

PREFIX = "deepseek_v3_"
PATTERN = f"{PREFIX}*.yaml"


def config_files(folder: Path | None = None) -> list[Path]:
    """Every size in `folder`, by default `configs` where we stand or else in the checkout that this runs from.

    Raises ConfigError where there is no such folder, or none in it.
    """
    folder = folder or _default_folder()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; --configs names one that holds {PATTERN} files")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise ConfigError(f"{folder}: holds no {PATTERN}; name a folder that does with --configs")
    return paths


def _default_folder() -> Path:
    candidates = (Path("configs"), Path(__file__).parents[3] / "configs")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(f"found no folder {' or '.join(map(str, candidates))}; name one with --configs")

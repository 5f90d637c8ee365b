"""The model sizes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek_v3.config.shipped import FOLDER, PATTERN, find_config, shipped_folder
from deepseek_v3.utils.errors import ConfigError


def chosen_files(files: Sequence[Path] | None, folder: Path | None) -> Sequence[Path]:
    """What a command's --config and --configs mean: the files, or else every size in the folder.

    Raises ConfigError where both are given, and as `config_files` does.
    """
    if files and folder:
        raise ConfigError(f"--configs {folder}: expected either --config files or a --configs folder, not both")
    return [find_config(file) for file in files] if files else config_files(folder)


def config_files(folder: Path | None = None) -> list[Path]:
    """Every size in `folder`, by default `configs` in the working directory or else those that ship.

    Raises ConfigError where there is no such folder, or none in it.
    """
    folder = folder or (FOLDER if FOLDER.is_dir() else shipped_folder())
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; --configs names one that holds {PATTERN} files")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise ConfigError(f"{folder}: holds no {PATTERN}; name a folder that does with --configs")
    return paths

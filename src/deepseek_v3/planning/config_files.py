"""The model sizes of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import here_or_in_checkout

PREFIX = "deepseek_v3_"
PATTERN = f"{PREFIX}*.yaml"


def chosen_files(files: Sequence[Path] | None, folder: Path | None) -> Sequence[Path]:
    """What a command's --config and --configs mean: the files, or else every size in the folder.

    Raises ConfigError where both are given, and as `config_files` does.
    """
    if files and folder:
        raise ConfigError(f"--configs {folder}: expected either --config files or a --configs folder, not both")
    return files or config_files(folder)


def config_files(folder: Path | None = None) -> list[Path]:
    """Every size in `folder`, by default `configs` where we stand or else in the checkout that this runs from.

    Raises ConfigError where there is no such folder, or none in it.
    """
    folder = folder or here_or_in_checkout(Path("configs"))
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; --configs names one that holds {PATTERN} files")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise ConfigError(f"{folder}: holds no {PATTERN}; name a folder that does with --configs")
    return paths

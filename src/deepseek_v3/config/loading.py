"""Loads a checked configuration from YAML and dotted overrides, writes it as YAML, and finds the shipped configs.

A shipped config is known by a short name, such as `1b` for `configs/deepseek_v3_1b.yaml`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from deepseek_v3.config.base import Section
from deepseek_v3.config.errors import FieldPath, describe_errors
from deepseek_v3.config.optimizer_config import STORED
from deepseek_v3.config.text_files import describe_content, printable_path, read_text
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.config.vocabulary_size import fill_vocabulary
from deepseek_v3.config.yaml_text import YamlProblem, parse_yaml, to_yaml
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value

PREFIX = "deepseek_v3_"
PATTERN = f"{PREFIX}*.yaml"
FOLDER = Path("configs")

# The shipped configs in an installed package, and in a checkout.
_PLACES = (Path(__file__).parents[1] / FOLDER, Path(__file__).parents[3] / FOLDER)

_MAX_FIELD_DEPTH = 16
AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, log: bool = False) -> RunConfig:
    """Reads a YAML file, applies overrides such as `model.num_hidden_layers=4`, and checks the whole.

    `path` is a file, or the name of a shipped config, such as `1b`. With `log`, logs the vocabulary size if the
    file leaves it open. Raises ConfigError with one line per problem: file and line (or override), field, problem.
    """
    return load_section(RunConfig, path, overrides, log=log)


def load_section(
    kind: type[AnySection], path: str | Path, overrides: Sequence[str] = (), *, log: bool = False
) -> AnySection:
    """Reads a YAML file with the fields of one section of the class `kind`; otherwise like `load_config`."""
    path = find_config(path)
    fields, where = _read(path)
    for override in overrides:
        _apply(override, fields, where)
    if kind is RunConfig:
        reason = fill_vocabulary(fields)
        if log and reason:
            get_logger("Model").info(f"Vocabulary: {reason}")
    return _checked(kind, fields, where)


def config_to_yaml(config: RunConfig) -> str:
    """The config as YAML, with every default written out; `load_config` reads it back to an equal object."""
    return to_yaml(config.model_dump(mode="json"))


def config_from_dict(fields: dict[str, Any], source: str) -> RunConfig:
    """Rebuilds a config from `model_dump(mode="json")`, the form in a checkpoint; `source` names it in errors.

    Rules that apply only to new runs are not checked, so that the checkpoint of an older version still loads.
    """
    return section_from_dict(RunConfig, fields, source, STORED)


def section_from_dict(
    kind: type[AnySection], fields: dict[str, Any], source: str, context: Mapping[str, bool] | None = None
) -> AnySection:
    """Builds a section of the class `kind` from its fields; `source` names them in errors.

    `context` is the validation context that pydantic passes to the validators.

    Raises ConfigError with one line per problem: source, field, problem.
    """
    try:
        return _checked(kind, fields, {(): source}, context)
    except TypeError as error:
        raise ConfigError(f"{source}: {error}; expected numbers, text, true or false, and lists of them") from None


def _checked(
    kind: type[AnySection],
    fields: dict[str, Any],
    where: Mapping[FieldPath, str],
    context: Mapping[str, bool] | None = None,
) -> AnySection:
    try:
        return kind.model_validate_json(json.dumps(fields), context=context)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, kind, where)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[FieldPath, str]]:
    """The fields of a file, and the file and line of each field by its path."""
    if not os.path.lexists(path):
        hint = (
            f"; expected a file, or a shipped config: {', '.join(shipped_names())}" if is_shipped_name(path) else ""
        )
        raise ConfigError(f"{printable_path(path)}: cannot be read: No such file or directory{hint}")
    text, shown = read_text(path), printable_path(path)
    try:
        fields, node = parse_yaml(text)
    except YamlProblem as problem:
        raise ConfigError(f"{shown}:{problem.line}: is not valid YAML: {problem}") from None
    if fields is not None and not isinstance(fields, dict):
        raise ConfigError(
            f"{shown}: holds {describe_content(fields)}, expected sections such as model: or fields such as name: x"
        )
    where: dict[FieldPath, str] = {(): shown}
    _locate(node, (), shown, where)
    return fields or {}, where


def _locate(node: yaml.Node | None, at: FieldPath, path: str, where: dict[FieldPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = (*at, key.value)
            where[field] = f"{path}:{key.start_mark.line + 1}"
            _locate(value, field, path, where)
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item = (*at, str(index))
            where[item] = f"{path}:{value.start_mark.line + 1}"
            _locate(value, item, path, where)


def _apply(override: str, fields: dict[str, Any], where: dict[FieldPath, str]) -> None:
    """Applies one override `section.field=value`; the value is YAML: `null`, `true`, `1e-4`, `[a, b]`."""
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    typed = f"--set {override if override.isprintable() and len(override) < 200 else format_value(override)}"
    if not equals or not all(path) or len(path) > _MAX_FIELD_DEPTH or not _is_unicode(name):
        raise ConfigError(f"{typed}: expected section.field=value, such as training.seed=1")
    try:
        value, _ = parse_yaml(text)
    except YamlProblem as problem:
        raise ConfigError(f"{typed}: the value {format_value(text)} is not valid YAML: {problem}") from None
    section = fields
    for part in path[:-1]:
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{typed}: {part} is the value {format_value(inner)}, not a section")
        section = inner
    section[path[-1]] = value
    for known in [known for known in where if known[: len(path)] == path]:
        del where[known]
    for length in range(1, len(path) + 1):
        where.setdefault(path[:length], typed)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text. Python passes on invalid bytes of a command line as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def shipped_folder() -> Path:
    """The folder of the shipped configs."""
    return next((place for place in _PLACES if place.is_dir()), FOLDER)


def is_shipped_name(path: Path) -> bool:
    """Whether a path may be the name of a shipped config: a name without a folder, or in `configs`."""
    return path.parent in (Path(), FOLDER)


def find_config(path: str | Path) -> Path:
    """The file that `path` names: an existing file, or else the shipped config of that name.

    Names are `deepseek_v3_1b` or `1b`, with or without `configs/` before and `.yaml` after, `data_config` and
    `deepspeed_config.json`. Any other path is returned unchanged.
    """
    path = Path(path)
    if os.path.isfile(path) or not is_shipped_name(path):  # noqa: PTH113 -- False for names too long
        return path
    folder = shipped_folder()
    names = [path.name] if path.suffix else [f"{path.name}.yaml", f"{PREFIX}{path.name}.yaml"]
    return next((folder / name for name in names if os.path.isfile(folder / name)), path)  # noqa: PTH113 -- likewise


def short_config_name(path: Path) -> str:
    """The shortest name by which `find_config` finds `path` from any folder."""
    if path.is_absolute() and path.parent == shipped_folder():
        return path.stem.removeprefix(PREFIX) if path.suffix == ".yaml" else path.name
    return str(path)


def shipped_names() -> list[str]:
    """The short names of the shipped YAML files."""
    return sorted(path.stem.removeprefix(PREFIX) for path in shipped_folder().glob("*.yaml"))


def select_config_files(files: Sequence[Path] | None, folder: Path | None) -> Sequence[Path]:
    """The files that --config names, or else every size in the folder that --configs names.

    Raises ConfigError if both options are given, and as `list_config_files` does.
    """
    if files and folder:
        raise ConfigError(f"--configs {folder}: expected either --config files or a --configs folder, not both")
    return [find_config(file) for file in files] if files else list_config_files(folder)


def list_config_files(folder: Path | None = None) -> list[Path]:
    """Every model size in `folder`; by default in `configs` of the working directory, or else the shipped ones.

    Raises ConfigError if the folder does not exist or holds no config.
    """
    folder = folder or (FOLDER if FOLDER.is_dir() else shipped_folder())
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; --configs names one that holds {PATTERN} files")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise ConfigError(f"{folder}: holds no {PATTERN}; name a folder that does with --configs")
    return paths

"""From a YAML file and dotted overrides to a checked RunConfig, and back to YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from deepseek_v3.config.base import Section
from deepseek_v3.config.problems import FieldPath, describe
from deepseek_v3.config.shipped import find_config, shipped_names
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.utils.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and aliases and reads 1e-4 as the number it is (YAML 1.2)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a field's name must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would otherwise read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies overrides such as `model.num_hidden_layers=4`, and checks the whole.

    `path` is a file, or the name of a shipped one, such as `1b`. Raises ConfigError with one line per problem: file
    and line (or override), field, what is wrong.
    """
    return load_section(RunConfig, path, overrides)


def load_section(kind: type[AnySection], path: str | Path, overrides: Sequence[str] = ()) -> AnySection:
    """As `load_config`, for a YAML file that holds the fields of any one kind of section."""
    path = find_config(path)
    fields, where = _read(path)
    for override in overrides:
        _apply(override, fields, where)
    try:
        return _checked(kind, fields, where)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}; quote the value if text is meant") from None


def config_to_yaml(config: RunConfig) -> str:
    """The resolved config, every default spelled out; `load_config` reads it back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_from_dict(fields: dict[str, Any], source: str) -> RunConfig:
    """Rebuilds a config from `model_dump(mode="json")`, as a checkpoint stores it; `source` names it in errors."""
    return section_from_dict(RunConfig, fields, source)


def section_from_dict(kind: type[AnySection], fields: dict[str, Any], source: str) -> AnySection:
    """A section of any kind from its fields; `source` names them in errors.

    Raises ConfigError with one line per problem: source, field, what is wrong.
    """
    try:
        return _checked(kind, fields, {(): source})
    except TypeError as error:
        raise ConfigError(f"{source}: {error}; expected numbers, text, true or false, and lists of them") from None


def _checked(kind: type[AnySection], fields: dict[str, Any], where: Mapping[FieldPath, str]) -> AnySection:
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ConfigError(describe(error, kind, where)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[FieldPath, str]]:
    """The file's fields, and for each field's path the place that gave it."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = ", ".join(shipped_names())
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; expected a file, or a shipped config: {names}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from None
    try:
        node = loader.get_single_node()
        fields = loader.construct_document(node) if node else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: is not valid YAML: {error.problem}") from None
    finally:
        loader.dispose()
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{path}: holds a {type(fields).__name__}, expected sections such as model: or fields such as name: x"
        )
    where: dict[FieldPath, str] = {(): str(path)}
    _locate(node, (), path, where)
    return fields, where


def _locate(node: yaml.Node | None, at: FieldPath, path: Path, where: dict[FieldPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = (*at, key.value)
            where[field] = f"{path}:{key.start_mark.line + 1}"
            _locate(value, field, path, where)


def _apply(override: str, fields: dict[str, Any], where: dict[FieldPath, str]) -> None:
    """Sets one dotted field; its value is read as YAML, so `null`, `true`, `1e-4` and lists mean what they say."""
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: expected section.field=value, such as training.seed=1")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 -- _Loader is a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value {text!r} is not valid YAML") from None
    section = fields
    for part in path[:-1]:
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {part} is the value {inner!r}, not a section")
        section = inner
    section[path[-1]] = value
    for known in [known for known in where if known[: len(path)] == path]:
        del where[known]
    for length in range(1, len(path) + 1):
        where.setdefault(path[:length], f"--set {override}")

"""The subset of YAML that this project reads and writes: numbers, text, true, false, null, lists and sections.

Tags (`!!timestamp`), aliases (`*name`) and repeated fields are refused, dates are text, and numbers are those of
YAML 1.2: `1e-4` is a number, `010` is ten and `1:30` is text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from decimal import Decimal
from typing import Any

import yaml

from deepseek_v3.utils.numbers import MAX_NUMBER_CHARACTERS
from deepseek_v3.utils.text import format_value

_DEEPEST = 50
_PREFIX = "tag:yaml.org,2002:"
_MERGE = f"{_PREFIX}merge"
_KINDS = {
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": (r"[-+]?\d(?:_?\d)*", "-+0123456789"),
    "float": (
        r"[-+]?(?:\d(?:_?\d)*(?:\.(?:\d(?:_?\d)*)?)?|\.\d(?:_?\d)*)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class YamlLoader(yaml.SafeLoader):
    """Reads one document; raises yaml.YAMLError for anything outside the subset."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own name, filled below

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error("aliases (*name) are not supported", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _error(f"tags ({event.tag.replace(_PREFIX, '!!')}) are not supported", event)
        if self._depth == _DEEPEST:
            raise _error(f"values are nested more than {_DEEPEST} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a field's name must be a word", key)
            name = self._text(key)
            if name in seen:
                raise _error(f"{format_value(name)} is given twice", key)
            seen.add(name)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def _text(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value:
            raise _error("holds a NUL character", node)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _error("holds half of a surrogate pair, expected text that UTF-8 can hold", node)
        return str(node.value)

    def _integer(self, node: yaml.ScalarNode) -> int:
        return int(_short(node).replace("_", ""))

    def _float(self, node: yaml.ScalarNode) -> float:
        """The number; an integer if it has an exponent and is whole, so that 1e23 keeps every digit."""
        text = _short(node).replace("_", "").lower()
        number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if "e" in text and math.isfinite(number) and number.is_integer():
            return int(Decimal(text)) if number else 0
        return number


class YamlDumper(yaml.SafeDumper):
    """Quotes text that `YamlLoader` would otherwise read as a value of another type."""


for _name, (_pattern, _first) in _KINDS.items():
    for _side in (YamlLoader, YamlDumper):
        _side.add_implicit_resolver(_PREFIX + _name, re.compile(rf"(?:{_pattern})\Z", re.ASCII), list(_first))
YamlLoader.add_constructor(f"{_PREFIX}str", YamlLoader._text)
YamlLoader.add_constructor(f"{_PREFIX}int", YamlLoader._integer)
YamlLoader.add_constructor(f"{_PREFIX}float", YamlLoader._float)


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its node, which holds the line numbers; (None, None) for an empty text.

    Raises YamlProblem with the line of the problem.
    """
    try:
        loader = YamlLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(f"holds the control character {format_value(chr(int(error.character)))}", line) from None
    try:
        node = loader.get_single_node()
        return (loader.construct_document(node) if node else None), node
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlProblem(_one_line(error.problem or "cannot be read"), line) from None
    except (ValueError, OverflowError):  # an escape such as "\UFFFFFFFF"
        raise YamlProblem("holds an escape that is not a character", loader.line + 1) from None
    finally:
        loader.dispose()


class YamlProblem(ValueError):  # noqa: N818
    """A problem of a YAML text, and its line, counted from 1."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def to_yaml(fields: dict[str, Any]) -> str:
    """The fields as YAML text, in their order; `parse_yaml` reads them back."""
    return yaml.dump(fields, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """The error at the position of a node or an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _short(node: yaml.ScalarNode) -> str:
    if len(node.value) > MAX_NUMBER_CHARACTERS:
        raise _error(f"a number of {len(node.value):,} characters, expected at most {MAX_NUMBER_CHARACTERS}", node)
    return str(node.value)


def _one_line(problem: str) -> str:
    return problem if problem.isprintable() and len(problem) < 200 else format_value(problem)

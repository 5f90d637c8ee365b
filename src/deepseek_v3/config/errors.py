"""Turns pydantic's validation errors into messages with one line for each problem."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from deepseek_v3.config.base import Section
from deepseek_v3.utils.text import format_value

FieldPath = tuple[str, ...]
Explanation = Callable[[dict[str, Any], type[Section], FieldPath], str]

# pydantic adds these to the location of an error in a union such as `input_path`.
_BRANCHES = ("str", "tuple[str, ...]")


def describe_errors(error: ValidationError, root: type[Section], where: Mapping[FieldPath, str]) -> str:
    """One line per problem: its place, the field's path, what was found and what was expected.

    `where` maps a field's path to the file and line, or the override, that set it; `where[()]` is the file.
    """
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors()]
    reported = {problem["loc"] for problem in problems}
    parents = {place[:-1] for place in reported}
    shown = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in parents]
    # A section with extensions checks its unknown fields last, and not at all if another field is wrong.
    unknown = sorted({path[0] for path in where if len(path) == 1} - {*root.field_names()})
    shown += [{"type": "extra_forbidden", "loc": (name,)} for name in unknown if (name,) not in reported]
    return "\n".join(_one_line(problem, root, where) for problem in shown)


def _one_line(problem: dict[str, Any], root: type[Section], where: Mapping[FieldPath, str]) -> str:
    path = tuple(str(part) for part in problem["loc"] if part not in _BRANCHES)
    place = next(where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in where)
    field = ".".join(part if part.isprintable() and len(part) < 60 else format_value(part) for part in path)
    return ": ".join(part for part in (place, field, _explain(problem, root, path)) if part)


def _explain(problem: dict[str, Any], root: type[Section], path: FieldPath) -> str:
    explain = _EXPLANATIONS.get(problem["type"])
    if explain:
        return explain(problem, root, path)
    message = str(problem["msg"]).removeprefix("Input should be ")
    return f"found {format_value(problem['input'])}: expected {message[0].lower()}{message[1:]}"


def _unknown(_problem: dict[str, Any], root: type[Section], path: FieldPath) -> str:
    section = _section_at(root, path[:-1])
    if path[-1] in (renamed := section.renamed_fields()):
        return f"this field was renamed; use {renamed[path[-1]]}"
    known = section.field_names()
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
    return f"unknown field; {hint}"


def _missing(_problem: dict[str, Any], _root: type[Section], _path: FieldPath) -> str:
    return "missing; this field has no default, give it a value"


def _contradiction(problem: dict[str, Any], _root: type[Section], _path: FieldPath) -> str:
    return str(problem["ctx"]["error"])


def _not_a_section(problem: dict[str, Any], root: type[Section], path: FieldPath) -> str:
    fields = ", ".join(_section_at(root, path).model_fields)
    return f"found {format_value(problem['input'])}: expected a section, with fields such as {fields}"


def _not_a_choice(problem: dict[str, Any], _root: type[Section], _path: FieldPath) -> str:
    choices = str(problem["ctx"]["expected"]).replace("'", "").replace("True", "true").replace("False", "false")
    return f"found {format_value(problem['input'])}: expected {choices}"


def _too_short(problem: dict[str, Any], _root: type[Section], _path: FieldPath) -> str:
    return f"found {format_value(problem['input'])}: expected a list of at least {problem['ctx']['min_length']}"


def _expecting(kind: str) -> Explanation:
    return lambda problem, _root, _path: f"found {format_value(problem['input'])}: expected {kind}"


_EXPLANATIONS: dict[str, Explanation] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "model_type": _not_a_section,
    "literal_error": _not_a_choice,
    "value_error": _contradiction,
    "too_short": _too_short,
    "tuple_type": _expecting("a list, such as [a, b]"),
    "list_type": _expecting("a list, such as [a, b]"),
    "dict_type": _expecting("names and values, such as {a: 1, b: 2}"),
    "string_type": _expecting("text"),
    "bool_type": _expecting("true or false"),
    "bool_parsing": _expecting("true or false"),
    "path_type": _expecting("a path"),
}


def _section_at(root: type[Section], path: FieldPath) -> type[Section]:
    """The class of the innermost section on the way from `root` along `path`."""
    section = root
    for name in path:
        section = section.subsection(name) or section
    return section

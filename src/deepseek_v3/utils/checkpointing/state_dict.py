"""Converts a training state between nested dicts and flat tensors under dotted names beside plain values.

`{"step": 7, "model": {"norm.weight": W}}` becomes `{"model.norm.weight": W}` and `{"step": 7, "model": {}}`.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from torch import Tensor

_SCALARS = (str, int, bool, type(None))


def flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of nested dicts by dotted name, and the dicts without them, which JSON can hold.

    Raises TypeError, naming the entry, for what `unflatten` could not rebuild: keys that are not str, values that
    are neither tensors nor JSON, and names in which a dot is ambiguous.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _without_tensors(state, (), tensors)


def unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: puts each tensor into the deepest dict that its name leads to."""
    state = deepcopy(plain)
    for name, tensor in tensors.items():
        parent, key = state, name
        head, _, rest = key.partition(".")
        while rest and isinstance(parent.get(head), dict):
            parent, key = parent[head], rest
            head, _, rest = key.partition(".")
        parent[key] = tensor
    return state


def _without_tensors(
    values: dict[str, Any], parents: tuple[str, ...], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in values.items():
        path = (*parents, key)
        _require_str(key, _in_brackets(parents))
        if isinstance(value, Tensor):
            _require_unambiguous(path, values)
            tensors[".".join(path)] = value
        elif isinstance(value, dict):
            plain[key] = _without_tensors(value, path, tensors)
        else:
            _require_json(value, _in_brackets(path))
            plain[key] = value
    return plain


def _require_unambiguous(path: tuple[str, ...], siblings: dict[str, Any]) -> None:
    head, dot, _ = path[-1].partition(".")
    if any("." in key for key in path[:-1]) or (dot and isinstance(siblings.get(head), dict)):
        raise TypeError(f"{_in_brackets(path)} is a tensor whose dotted name could mean another entry")


def _require_json(value: Any, name: str) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _require_json(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_str(key, name)
            _require_json(item, f"{name}[{key!r}]")
    elif type(value) not in _SCALARS and not (type(value) is float and math.isfinite(value)):
        raise TypeError(
            f"{name} is {value!r:.40} ({type(value).__name__}); beside tensors in dicts, a sharded checkpoint "
            "holds dicts, lists, str, int, finite float, bool and None"
        )


def _require_str(key: Any, name: str) -> None:
    if not isinstance(key, str):
        raise TypeError(f"{name} has the key {key!r}; the keys of a sharded checkpoint are str")


def _in_brackets(path: tuple[str, ...]) -> str:
    """The place of an entry as Python code: `state['model']['norm.weight']`."""
    return "state" + "".join(f"[{key!r}]" for key in path)

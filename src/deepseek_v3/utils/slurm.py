"""Slurm's short notations for lists of nodes and of numbers of tasks, read without asking a Slurm command."""

from __future__ import annotations

import re

_FIRST_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)")
_RANGES = re.compile(r"\[([^\[\],-]+)[^\[\]]*\]")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def first_host(node_list: str) -> str:
    """The first node of a list such as `node[01-03,07],login`: `node01`. Raises ValueError for another notation."""
    entry = _FIRST_ENTRY.match(node_list)
    host = _RANGES.sub(r"\1", entry[0]) if entry else ""
    if not host or "[" in host:
        raise ValueError(f"{node_list!r} is no list of nodes such as node[01-03,07]")
    return host


def tasks_on_node(counts: str, node: int) -> int:
    """The tasks on node number `node`, from 0, by a list such as `8(x3),4`. Raises ValueError where it has none."""
    left = node
    for entry in counts.split(","):
        match = _REPEATED.fullmatch(entry)
        if match is None:
            raise ValueError(f"{counts!r} is no list of numbers of tasks such as 8(x3),4")
        left -= int(match[2] or 1)
        if left < 0:
            return int(match[1])
    raise ValueError(f"{counts!r} has no node {node}")

"""What the control groups of this process leave it of the machine: memory and time of the CPU.

A group may take no more than any group that it lies in, so the limits of all of them count. Both versions of
control groups are read, of which a machine may have both (man 7 cgroups).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")


class _Mount(NamedTuple):
    """Where the groups of a controller are mounted, and which group stands at the top of the mount."""

    place: Path
    top: PurePosixPath
    is_v2: bool


def usable_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that this process may take: the machine's, or the least limit of its control groups.

    `root` is the folder in which `proc` and `sys` are looked for.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        for folder, is_v2 in _groups("memory", root)
    ]
    return int(min([physical, *(limit for limit in limits if limit is not None and limit > 0)]))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that the control groups grant; None where there is no limit. `root`: as above."""
    quotas = [_quota(folder, is_v2) for folder, is_v2 in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, is_v2: bool) -> float | None:
    if is_v2:
        quota, period = _number(folder / "cpu.max"), _number(folder / "cpu.max", 1)
    else:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _number(file: Path, word: int = 0) -> int | None:
    """A whole number in a file of a group; None where there is none, or it says `max`."""
    try:
        return int(file.read_text(encoding="ascii").split()[word])
    except (OSError, ValueError, IndexError):
        return None


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's groups that may limit the controller, each with whether it is of version 2."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        is_v2 = number == "0" and not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        for mount in _mounts(controller, root):
            if mount.is_v2 == is_v2:
                path = PurePosixPath(group)
                # From a namespace of its own a process may see groups outside as /.. and others not at all.
                inside = path.relative_to(mount.top) if _lies_in(path, mount.top) else PurePosixPath()
                for folder in (inside, *inside.parents):
                    yield mount.place / folder, is_v2


def _lies_in(path: PurePosixPath, top: PurePosixPath) -> bool:
    return path.is_relative_to(top) and ".." not in path.parts


def _mounts(controller: str, root: Path) -> Iterator[_Mount]:
    """Each mount of version 2, and of the controller's groups of version 1 (man 5 proc: mountinfo)."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, kind = line.partition(" - ")
        words, types = fields.split(), kind.split()
        if len(words) < 5 or len(types) < 3:
            continue
        is_v2 = types[0] == "cgroup2"
        if is_v2 or (types[0] == "cgroup" and controller in types[2].split(",")):
            place = root / _unescaped(words[4]).lstrip("/")
            yield _Mount(place, PurePosixPath(_unescaped(words[3])), is_v2)


def _unescaped(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []

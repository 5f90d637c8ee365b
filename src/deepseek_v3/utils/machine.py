"""The memory, CPU cores and threads that this process may use.

Control groups may limit memory and CPU time to less than the machine has. A group may use no more than any group
that contains it, so the limits of all of them count. A machine may have control groups of version 1, of version 2,
or both (man 7 cgroups). Imports no torch: `wait_passively` has to run before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")


class _Mount(NamedTuple):
    """Where the groups of a controller are mounted, and which group is at the root of the mount."""

    path: Path
    root_group: PurePosixPath
    is_v2: bool


def usable_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that this process may use: the machine's, or the lowest limit of its control groups.

    `root` is the folder that contains `proc` and `sys`.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        for folder, is_v2 in _groups("memory", root)
    ]
    return int(min([physical, *(limit for limit in limits if limit is not None and limit > 0)]))


def free_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that this process may still take: no more than the machine has left for new processes.

    `root` as in `usable_memory`.
    """
    own_pages = _number(root / "proc/self/statm", 1) or 0
    left = usable_memory(root) - own_pages * os.sysconf("SC_PAGE_SIZE")
    kib = [int(line.split()[1]) for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    return max(0, min([left, *(1024 * number for number in kib)]))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The CPU time that the control groups grant, in cores; None without a limit. `root` as in `usable_memory`."""
    quotas = [_quota(folder, is_v2) for folder, is_v2 in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def wait_passively() -> None:
    """Makes OpenMP threads sleep while they wait for each other, unless the user's environment says otherwise.

    By default they spin, and on a busy machine that takes CPU time from the thread that they wait for. With GNU's
    library they still spin briefly first; without this, training on an idle machine is a quarter slower. A call
    has an effect only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, or the quota of its control groups if that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def describe_threads(threads: int, cores: int, load: float) -> str:
    """The log line about the number of threads and how to change it, with advice if the machine is busy.

    `load` is the load average of the minute before this process started to compute.
    """
    line = f"Threads: {threads} on {cores} cores; OMP_NUM_THREADS sets another number"
    if threads > 1 and load > cores - threads + 0.5:
        line += f".\nThe load is {load:.1f}: OMP_NUM_THREADS=1 may be faster"
    return line


def _quota(folder: Path, is_v2: bool) -> float | None:
    if is_v2:
        quota, period = _number(folder / "cpu.max"), _number(folder / "cpu.max", 1)
    else:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _number(file: Path, word: int = 0) -> int | None:
    """The whole number at position `word` of a file; None if there is none, or it says `max`."""
    try:
        return int(file.read_text(encoding="ascii").split()[word])
    except (OSError, ValueError, IndexError):
        return None


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the folders of the groups that may limit this process, and whether they are of version 2."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        is_v2 = number == "0" and not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        for mount in _mounts(controller, root):
            if mount.is_v2 == is_v2:
                path = PurePosixPath(group)
                # In its own namespace a process may see outer groups as /.., or not at all.
                inside = (
                    path.relative_to(mount.root_group) if _is_inside(path, mount.root_group) else PurePosixPath()
                )
                for folder in (inside, *inside.parents):
                    yield mount.path / folder, is_v2


def _is_inside(path: PurePosixPath, top: PurePosixPath) -> bool:
    return path.is_relative_to(top) and ".." not in path.parts


def _mounts(controller: str, root: Path) -> Iterator[_Mount]:
    """Yields the mounts of version 2, and of the controller's groups of version 1 (man 5 proc: mountinfo)."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, kind = line.partition(" - ")
        words, types = fields.split(), kind.split()
        if len(words) < 5 or len(types) < 3:
            continue
        is_v2 = types[0] == "cgroup2"
        if is_v2 or (types[0] == "cgroup" and controller in types[2].split(",")):
            path = root / _unescaped(words[4]).lstrip("/")
            yield _Mount(path, PurePosixPath(_unescaped(words[3])), is_v2)


def _unescaped(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []

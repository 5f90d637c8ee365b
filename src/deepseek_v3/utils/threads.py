"""How many threads compute on a CPU, and how they wait for each other."""

from __future__ import annotations

import os

from deepseek_v3.utils.cgroups import cpu_quota


def wait_passively() -> None:
    """Lets threads of OpenMP sleep where they wait for each other, unless the user's environment says otherwise.

    By default they spin, and on a machine with other work they spin away the time of the thread that they wait
    for. With GNU's library they spin shortly first, without which an idle machine is a quarter slower. Only heard
    before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, or the quota of its control groups where that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def describe_threads(threads: int, cores: int, load: float) -> str:
    """For the log: the number of threads, how to choose another, and what other work on the machine suggests.

    `load` is the load average of the last minute before this process began to compute.
    """
    line = f"Threads: {threads} on {cores} cores; OMP_NUM_THREADS sets another number"
    if threads > 1 and load > cores - threads + 0.5:
        line += f".\nThe load is {load:.1f}: OMP_NUM_THREADS=1 may be faster"
    return line

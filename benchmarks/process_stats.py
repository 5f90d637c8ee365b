"""Runs a program and measures its wall-clock time and the memory of its process tree."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_INTERVAL = 0.2  # seconds between two samples of the memory


class ProcessStats(NamedTuple):
    """Wall-clock seconds from start to exit, and the largest sampled memory in 10^6 bytes.

    Memory is the anonymous and shared memory of all processes. Mapped files do not count, because the system can
    drop their pages whenever it needs memory.
    """

    seconds: float
    peak_megabytes: float


def run_and_measure(command: Sequence[str | Path]) -> ProcessStats:
    """Runs a command. Raises SystemExit with the command's output where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak = _Peak(process.pid)
    peak.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - start
    peak.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{output.decode(errors='replace')}")
    return ProcessStats(seconds, peak.bytes / 1e6)


class _Peak(threading.Thread):
    """The largest memory of a process tree.

    Pages that a process shares with the one it was forked from count for both: to divide them, the kernel walks
    through all pages (`smaps_rollup`), which slows the program down by a fifth.
    """

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._root = root
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.bytes = max(self.bytes, sum(map(_filled, _tree(self._root))))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _tree(root: int) -> set[int]:
    """A process and all its descendants."""
    parents = dict(filter(None, map(_parent, Path("/proc").glob("[0-9]*"))))
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def _parent(process: Path) -> tuple[int, int] | None:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
    return int(process.name), int(fields[1])


def _filled(pid: int) -> int:
    """Bytes of anonymous and of shared memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))

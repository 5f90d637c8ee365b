"""Memory, cores and threads: limits of both versions of control groups, and passive waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v3.utils import machine
from deepseek_v3.utils.machine import cpu_quota, describe_threads, free_memory, usable_cores, usable_memory

GIB = 2**30
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU = "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture(autouse=True)
def _sixty_four_gib_and_sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def _machine(root: Path, groups: str, mounts: str, **files: str) -> Path:
    """Creates /proc/self and files under /sys/fs/cgroup in `root`; `__` in a name means a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _limits(**limits: object) -> dict[str, str]:
    return {f"{name}memory.max": f"{limit}\n" for name, limit in limits.items()}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"job__step__": 2 * GIB, "job__": 8 * GIB, "": "max"}, 2 * GIB),
        ({"job__step__": "max", "job__": 8 * GIB, "": "max"}, 8 * GIB),
        ({"job__step__": 16 * GIB, "job__": 8 * GIB}, 8 * GIB),
        ({"job__": 3 * GIB, "other__": GIB, "job__step__below__": GIB}, 3 * GIB),
        ({"job__step__": "max", "": 5 * GIB}, 5 * GIB),
        ({"job__step__": 128 * GIB}, 64 * GIB),
        ({"job__step__": "nonsense", "job__": ""}, 64 * GIB),
        ({}, 64 * GIB),
    ],
)
def test_the_lowest_limit_of_nested_groups_counts(tmp_path: Path, limits: dict[str, object], expected: int) -> None:
    root = _machine(tmp_path, "0::/job/step\n", V2.format(top="/"), **_limits(**limits))
    assert usable_memory(root) == expected


def test_limits_of_cgroups_version_1(tmp_path: Path) -> None:
    groups = "4:memory:/slurm/uid_1/job_2\n1:cpu:/\n0::/\n"
    files = {
        "memory__memory.limit_in_bytes": "9223372036854771712",
        "memory__slurm__uid_1__memory.limit_in_bytes": str(6 * GIB),
        "memory__slurm__uid_1__job_2__memory.limit_in_bytes": str(7 * GIB),
    }
    assert usable_memory(_machine(tmp_path, groups, V1.format(top="/"), **files)) == 6 * GIB


def test_a_machine_with_both_cgroup_versions(tmp_path: Path) -> None:
    unified = V2.format(top="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    files = {
        "memory__a__memory.limit_in_bytes": str(4 * GIB),
        "unified__b__memory.max": str(3 * GIB),
    }
    root = _machine(tmp_path, "4:memory:/a\n0::/b\n", V1.format(top="/") + unified, **files)
    assert usable_memory(root) == 3 * GIB


@pytest.mark.parametrize(
    ("group", "top"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/", "/"), ("/../../other", "/")],
)
def test_inside_a_container_the_mount_is_the_group(tmp_path: Path, group: str, top: str) -> None:
    root = _machine(tmp_path, f"0::{group}\n", V2.format(top=top), **_limits(**{"": 2 * GIB}))
    assert usable_memory(root) == 2 * GIB


@pytest.mark.parametrize(
    ("limit", "available", "expected"), [(8, 16, 7), (8, 3, 3), (64, None, 63), ("max", 70, 63), (0.5, 16, 0)]
)
def test_free_memory_is_what_limit_and_machine_leave(
    tmp_path: Path, limit: float | str, available: int | None, expected: int
) -> None:
    """This process holds 1 GiB."""
    found = limit if isinstance(limit, str) else int(limit * GIB)
    root = _machine(tmp_path, "0::/\n", V2.format(top="/"), **_limits(**{"": found}))
    (root / "proc/self/statm").write_text(f"900000 {GIB // 4096} 1 1 0 1 0\n")
    if available is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available * GIB // 1024} kB\n")
    assert free_memory(root) == expected * GIB


def test_the_whole_machine_without_control_groups(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == 64 * GIB
    assert cpu_quota(tmp_path) is None
    root = _machine(tmp_path, "4:pids:/a\nrubbish\n", "rubbish\n" + V1.format(top="/"))
    assert (usable_memory(root), cpu_quota(root)) == (64 * GIB, None)


def test_the_lowest_cpu_quota_of_nested_groups_counts(tmp_path: Path) -> None:
    quotas = {"job__cpu.max": "250000 100000", "job__step__cpu.max": "max 100000", "cpu.max": "900000 100000"}
    assert cpu_quota(_machine(tmp_path / "two", "0::/job/step\n", V2.format(top="/"), **quotas)) == 2.5
    first = {
        "cpu,cpuacct__job__cpu.cfs_quota_us": "400000",
        "cpu,cpuacct__job__cpu.cfs_period_us": "100000",
        "cpu,cpuacct__cpu.cfs_quota_us": "-1",
        "cpu,cpuacct__cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(_machine(tmp_path / "one", "2:cpu,cpuacct:/job\n", V1_CPU.format(top="/"), **first)) == 4


@pytest.mark.parametrize(("quota", "cores"), [(None, 16), (2.0, 2), (2.5, 2), (0.5, 1), (99.0, 16)])
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("number", "load", "advice"),
    [(2, 0.3, False), (2, 1.4, True), (1, 30.0, False), (1, 0.0, False), (2, 0.6, True)],
)
def test_one_thread_is_advised_on_a_busy_machine(number: int, load: float, advice: bool) -> None:
    line = describe_threads(number, 2, load)
    assert line.startswith(f"Threads: {number} on 2 cores; OMP_NUM_THREADS sets another number")
    assert ("OMP_NUM_THREADS=1 may be faster" in line) == advice


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE 10000"), ("ACTIVE", "ACTIVE None")])
def test_threads_wait_passively_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    program = (
        "import os, sys\n"
        "from deepseek_v3 import cli\n"
        "cli.run_app = lambda app: print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'), "
        "'torch' in sys.modules)\n"
        "cli.main()"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == f"{expected} False\n"

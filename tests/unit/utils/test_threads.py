"""Threads on a CPU: no more than cores are granted, passive waiting, and a line that says how to change them."""

import os
import subprocess
import sys

import pytest

from deepseek_v3.utils import threads
from deepseek_v3.utils.threads import describe_threads, usable_cores


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.mark.parametrize(("quota", "cores"), [(None, 16), (2.0, 2), (2.5, 2), (0.5, 1), (99.0, 16)])
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("number", "load", "advice"),
    [(2, 0.3, False), (2, 1.4, True), (1, 30.0, False), (1, 0.0, False), (2, 0.6, True)],
)
def test_the_line_advises_one_thread_where_others_work(number: int, load: float, advice: bool) -> None:
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

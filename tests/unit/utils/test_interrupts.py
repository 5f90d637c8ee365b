"""Ctrl-C during a program's imports and in its worker processes: exit code 130 and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_v3.utils.interrupts import exit_on_interrupt
from helpers import ROOT


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The exit codes with which the process would have ended; Ctrl-C has Python's own handler."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    yield codes
    signal.signal(signal.SIGINT, earlier)


def test_ctrl_c_during_imports_ends_the_process_at_once(exits: list[int]) -> None:
    with exit_on_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert exits == [130]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stays_ignored_where_it_was(exits: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with exit_on_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert exits == []


def test_programs_handle_ctrl_c_before_other_imports() -> None:
    code = "import sys, deepseek_v3.utils.interrupts; print({'typer', 'pydantic', 'torch'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
    starts = [ROOT / "src" / "training" / "train.py", ROOT / "src" / "deepseek_v3" / "__main__.py"]
    for script in [*(ROOT / "scripts").glob("*.py"), *starts]:
        lines = script.read_text(encoding="utf-8").splitlines()
        ours = [line for line in lines if line.lstrip().startswith("from deepseek_v3")]
        assert ours[0].startswith("from deepseek_v3.utils.interrupts import exit_on_interrupt"), script
        assert all(line.startswith("    ") for line in ours[1:]), script


HANGING = """
import atexit, subprocess, sys, time, typer
from deepseek_v3.utils import interrupts
from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.errors import UserError

def work() -> None:
    print("done")
    {ending}

interrupts._SECONDS_TO_EXIT = 0.2
interrupts.exit_may_hang.set()
subprocess.Popen(["sleep", "300"])  # keeps the standard output open
atexit.register(time.sleep, 300)
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(work)
run_app(app)
"""


@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [
        ("pass", 0, ""),
        ("raise UserError('no tokens')", 1, "error: no tokens"),
        ("raise KeyboardInterrupt", 130, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_an_exit_handler_that_hangs_delays_no_exit(ending: str, code: int, error: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HANGING.format(ending=ending)], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (code, "done\n")
    assert run.stderr.strip().endswith(error)


WORKERS = """
import multiprocessing, re
from multiprocessing import forkserver
from pathlib import Path
from deepseek_v3.utils.process_pool import start_fork_server

def blocked(pid):
    mask = re.search(r"SigBlk:\\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) & 2)

if __name__ == "__main__":
    start_fork_server(["json"])
    context = multiprocessing.get_context("forkserver")
    with context.Pool(1) as pool:
        print(blocked("self"), blocked(forkserver._forkserver._forkserver_pid), pool.map(blocked, ["self"]))
"""


def test_workers_and_the_fork_server_ignore_ctrl_c(tmp_path: Path) -> None:
    program = tmp_path / "workers.py"
    program.write_text(WORKERS)
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert run.stdout == "False True [True]\n"

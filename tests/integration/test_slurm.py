"""The Slurm script under a fake Slurm with two nodes: notice, requeue, resume, a rank's death, bad arguments."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.jobs import HANGS

SCRIPT = ROOT / "scripts" / "train_slurm.sh"
FIRST_PORT = 20_000  # the script adds the last digits of the job's number

# Replaces the trainer: counts steps on all ranks, saves the number when asked to stop, and resumes from it.
# In its first start it asks for the notice of the end in step 3; in its second a rank dies in the third step.
PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.distributed.launch import World, process_group, select_device
from deepseek_v3.utils.logging import configure_logging
from deepseek_v3.utils.distributed.watchdog import Watchdog

assert sys.argv[1:] == ["--config", "run.yaml", "--resume", "auto", "--set", "a.b=two words"], sys.argv
saved, slurm = Path("saved"), Path(os.environ["FAKE_SLURM"])

def train():
    world = World.from_environment()
    name = f"rank {world.rank} of {world.size}, local {world.local_rank}"
    timeout = timedelta(seconds=300)
    resumed = saved.exists()
    first = int(saved.read_text()) + 1 if resumed else 1
    with (
        process_group(world, select_device("cpu", world), timeout),
        Watchdog(world, timeout, silence=timedelta(seconds=2 if resumed else 60)) as watchdog,
        GracefulStop(world.size) as stop,
    ):
        stop.install()
        for step in range(first, 10_000):
            watchdog.step(step)
            total = torch.tensor(world.rank + step)
            dist.all_reduce(total)
            assert total == 1 + 2 * step
            if step == first:
                print(f"{name}: begins with {first}", flush=True)
            if step == first + 2 and world.rank == 1:
                if resumed:
                    os.kill(os.getpid(), signal.SIGKILL)
                (slurm / "notify").touch()
            time.sleep(0.02)
            if stop.should_stop():
                break
        if world.rank == 0:
            saved.write_text(str(step))
        print(f"{name}: ends with {step}", flush=True)

configure_logging()
run_app(train)
"""

# Replaces torchrun and the trainer, without torch: saves at the notice, for which node 0 asks when both are ready.
NODE = """
import os, signal, sys, time
from pathlib import Path

def save(*_):
    (slurm / f"saved_{node}").touch()
    os._exit(0)

slurm, node = Path(os.environ["FAKE_SLURM"]), os.environ["SLURM_NODEID"]
if (slurm / f"saved_{node}").exists():
    sys.exit()
signal.signal(signal.SIGUSR1, save)
(slurm / f"ready_{node}").touch()
while node == "0" and not (slurm / "ready_1").exists():
    time.sleep(0.01)
if node == "0":
    (slurm / "notify").touch()
time.sleep(600)
"""
# Replaces Python: lists no packages, which would take seconds, and runs NODE unless TORCHRUN is set.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "-m pip freeze") ;;
    "-m torch.distributed.run "*)
        [[ -z ${{TORCHRUN:-}} ]] || exec {sys.executable} "$@"
        {sys.executable} "$FAKE_SLURM/node.py"
        ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def job_number() -> str:
    """The number of a job whose rendezvous port is free."""
    while True:
        port = random.randrange(FIRST_PORT, FIRST_PORT + 10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(4_270_000 + port - FIRST_PORT)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, with PROGRAM as its trainer; the fake Slurm is beside it."""
    folder = tmp_path / "checkout"
    (folder / "src" / "training").mkdir(parents=True)
    (folder / "src" / "training" / "train.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "run.yaml").touch()
    commands = tmp_path / "bin"
    commands.mkdir()
    text = (ROOT / "tests" / "helpers" / "fakes" / "slurm.py").read_text(encoding="utf-8")
    for name in ("sbatch", "srun", "scontrol"):
        (commands / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        (commands / name).chmod(0o755)
    (tmp_path / "node.py").write_text(NODE, encoding="utf-8")
    (commands / "python").write_text(PYTHON, encoding="utf-8")
    (commands / "python").chmod(0o755)
    return folder


def _environment(checkout: Path, job: str, **variables: str) -> dict[str, str]:
    # Coverage of these processes would measure little of the package. The script itself has to unbuffer the output.
    left_out = ("SLURM_", "COVERAGE_", "PYTHONUNBUFFERED")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(left_out)},
        "PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}",
        "FAKE_SLURM": str(checkout.parent),
        "FAKE_SLURM_JOB": job,
        "PYTHON": str(checkout.parent / "bin" / "python"),
        "PYTHONPATH": str(ROOT / "src"),
        **variables,
    }


def _submit(checkout: Path, job: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["sbatch", str(SCRIPT), "run.yaml", "--set", "a.b=two words"]
    return subprocess.run(
        words,
        cwd=checkout,
        env=_environment(checkout, job, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
    )


def _of_script(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[Slurm]")]


def test_a_noticed_job_saves_comes_back_and_finishes(checkout: Path) -> None:
    variables = {"NCCL_DEBUG": "WARN", "NCCL_API_KEY": "hidden", "DSV3_TOKEN": "hidden", "HOME_PAGE": "unrelated"}
    job = _submit(checkout, "7", **variables)
    assert job.returncode == 0, job.stdout
    assert _of_script(job.stdout) == [
        "[Slurm] notice of the end: the training processes save and stop",
        "[Slurm] exit code 0; requeued, to resume from the newest checkpoint",
        "[Slurm] the run has finished",
    ]
    assert sorted(path.name for path in checkout.parent.glob("saved_*")) == ["saved_0", "saved_1"]
    for start in (0, 1):
        described = (checkout / "slurm_jobs" / "7" / f"environment_{start}.txt").read_text()
        assert f"job 7, start {start}" in described
        assert "NCCL_DEBUG=WARN" in described
        assert "Python 3" in described
        assert "hidden" not in described
        assert "unrelated" not in described


def test_ranks_stop_together_resume_and_name_one_that_dies(checkout: Path, job_number: str) -> None:
    job = _submit(checkout, job_number, TORCHRUN="1", DSV3_MAX_RESTARTS="1")
    assert job.returncode != 0
    *lines, last = _of_script(job.stdout)
    assert lines == [
        "[Slurm] notice of the end: the training processes save and stop",
        "[Slurm] exit code 0; requeued, to resume from the newest checkpoint",
    ]
    assert re.fullmatch(r"\[Slurm\] exit code \d+; not requeued after 1 restarts .*", last)
    assert job.stdout.count("[Trainer] SIGUSR1: all ranks stop after this step and save") == 1
    stopped = next(step for _, event, step in _reports(job.stdout) if event == "ends")
    expected = [(rank, *report) for rank in "01" for report in (("begins", 1), ("ends", stopped))]
    expected += [(rank, "begins", stopped + 1) for rank in "01"]
    assert 3 <= stopped < 10_000
    assert sorted(_reports(job.stdout)) == sorted(expected)
    logs = list((checkout / "slurm_jobs" / job_number).glob("node_[01]/*/attempt_0/0/stdout.log"))
    assert len(logs) == 4
    assert sorted(report for log in logs for report in _reports(log.read_text())) == sorted(expected)
    named = re.findall(r"\[Watchdog\] error: (.*)", job.stdout)
    assert len(named) == 1, job.stdout
    assert re.match(r"rank 1 \(host .*\) has not answered for 2 s; the job stops: resume with", named[0])


def _reports(output: str) -> list[tuple[str, str, int]]:
    """Rank, event and step of every line that PROGRAM has printed."""
    found = re.findall(r"rank (\d) of 2, local 0: (begins|ends) with (\d+)", output)
    return [(rank, event, int(step)) for rank, event, step in found]


@pytest.mark.parametrize(
    ("status", "variables", "expected"),
    [
        (0, {}, ["the run has finished"]),
        (1, {"DSV3_MAX_RESTARTS": "2"}, ["exit code 1; requeued, to resume from the newest checkpoint"] * 2
         + ["exit code 1; not requeued after 2 restarts (DSV3_MAX_RESTARTS = 2)"]),
        (1, {"FAKE_SLURM_STATE": "CANCELLED"}, ["Slurm has the job as CANCELLED; it is not requeued from here"]),
    ],
)  # fmt: skip
def test_when_a_job_comes_back(checkout: Path, status: int, variables: dict[str, str], expected: list[str]) -> None:
    job = _submit(checkout, "1", FAKE_SLURM_STATUS=str(status), **variables)
    assert _of_script(job.stdout) == [f"[Slurm] {line}" for line in expected], job.stdout
    assert job.returncode == status


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "the config is missing; expected: sbatch scripts/train_slurm.sh CONFIG.yaml"),
        (["--set", "a=1"], {}, "the config is missing"),
        (["missing.yaml"], {}, "missing.yaml: no such config"),
        (["run.yaml", "--resume", "latest"], {}, "--resume: is set by this script"),
        (["run.yaml", "--config=other.yaml"], {}, "--config=other.yaml: is set by this script"),
        (["run.yaml"], {"DSV3_MAX_RESTARTS": "many"}, "DSV3_MAX_RESTARTS = many: expected a number"),
        (
            ["run.yaml"],
            {"SLURM_SUBMIT_DIR": "/"},
            "holds no src/training/train.py; submit from the checkout's root",
        ),
        (["run.yaml"], {"SLURM_JOB_ID": ""}, "this is no Slurm job; start it with: sbatch"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(
    checkout: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    environment = _environment(checkout, "1", **{"SLURM_JOB_ID": "1", **variables})
    run = subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=checkout, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ")
    assert message in run.stderr
    assert not (checkout / "slurm_jobs").exists()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "install requirements-dev.txt"
    scripts = sorted(str(path) for path in (ROOT / "scripts").glob("*.sh"))
    run = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert run.stdout == ""
    assert run.returncode == 0

"""A fake sbatch, srun and scontrol, installed under these names on the PATH: two "nodes" on this machine.

Like Slurm it runs a copy of the script, signals every process of a step, kills the processes that a step leaves
behind, and starts a requeued job again. If sbatch is killed, its steps end. $FAKE_SLURM_JOB is the number of the
job. A file `notify` in the folder $FAKE_SLURM asks for the notice before the end of the job's time; a file
`requeued` says that the job is to start again. $FAKE_SLURM_STATUS makes srun return this status at once, and
$FAKE_SLURM_STATE is the job's state.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", "."))
NODES = 2
KILL_WAIT = 10.0  # seconds; Slurm's own is 30


def sbatch(arguments: list[str]) -> int:
    """Runs a job to its end, as often as it is requeued."""
    script = FOLDER / "slurm_script"  # not where it was submitted from
    shutil.copy(arguments[0], script)
    restarts, status, requeued = 0, 0, True
    while requeued:
        variables = {
            "SLURM_JOB_ID": os.environ["FAKE_SLURM_JOB"],
            "SLURM_SUBMIT_DIR": str(Path.cwd()),
            "FAKE_SLURM_PID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(NODES),
            "SLURM_JOB_NODELIST": "127.0.0.[1,1]",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        job = subprocess.Popen(["bash", str(script), *arguments[1:]], cwd="/", env={**os.environ, **variables})
        while job.poll() is None:
            if _taken("notify"):
                job.send_signal(signal.SIGUSR1)  # --signal=B: means the script alone
            time.sleep(0.05)
        status, requeued, restarts = job.returncode, _taken("requeued"), restarts + 1
    return status


def srun(arguments: list[str]) -> int:
    """Runs a task on each node; passes signals on to all of its processes, and ends all after one that failed."""
    command = _without_options(arguments)
    if "FAKE_SLURM_STATUS" in os.environ:
        return int(os.environ["FAKE_SLURM_STATUS"])
    tasks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "SLURM_STEP_ID": "0",
                "SLURM_NODEID": str(node),
                "SLURM_PROCID": str(node),
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": str(NODES),
                "SLURM_GPUS_ON_NODE": "1",
            },
            start_new_session=True,
        )
        for node in range(NODES)
    ]
    signal.signal(signal.SIGUSR1, lambda number, _frame: [_signal_all(task, number) for task in tasks])
    ending = False
    while any(task.poll() is None for task in tasks):
        failed = any(task.poll() for task in tasks) or not Path("/proc", os.environ["FAKE_SLURM_PID"]).exists()
        if failed and not ending:
            ending = True
            for task in tasks:
                _signal_all(task, signal.SIGTERM)
        time.sleep(0.05)
    for task in tasks:
        _end_left_processes(task)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes from here on is not to change the exit code
    return max(abs(task.returncode) for task in tasks)


def scontrol(arguments: list[str]) -> int:
    """Knows the nodes and the state of the job, and takes note of a requeue."""
    if arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.1")
    elif arguments[:2] == ["show", "job"]:
        print(
            f"JobId={arguments[-1]} JobName=x JobState={os.environ.get('FAKE_SLURM_STATE', 'RUNNING')} Reason=None"
        )
    elif arguments[0] == "requeue":
        (FOLDER / "requeued").touch()
    else:
        return 1
    return 0


def _signal_all(task: subprocess.Popen[bytes], number: int) -> None:
    """Signals all processes of a task, as long as it runs."""
    if task.poll() is None:
        os.killpg(task.pid, number)


def _end_left_processes(task: subprocess.Popen[bytes]) -> None:
    """Waits for the processes that an ended task has left behind, and kills a launcher that does not end.

    A launcher that gets SIGTERM while it closes its ranks never ends: the threads that pass on their output run on.
    The wait begins when the ranks have ended, however long a busy machine takes for that.
    """
    deadline = time.monotonic() + KILL_WAIT
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(task.pid, 0)
            if _has_ranks(task.pid):
                deadline = time.monotonic() + KILL_WAIT
            time.sleep(0.05)
        os.killpg(task.pid, signal.SIGKILL)


def _has_ranks(group: int) -> bool:
    """Whether a process of a group has a living child outside the group, as a launcher has its ranks."""
    parents_and_groups = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, own_group = status.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":  # a launcher that hangs never reaps its ranks
                parents_and_groups[int(status.parent.name)] = (int(parent), int(own_group))
    members = {pid for pid, (_, own_group) in parents_and_groups.items() if own_group == group}
    return any(parent in members for pid, (parent, _) in parents_and_groups.items() if pid not in members)


def _without_options(arguments: list[str]) -> list[str]:
    while arguments[0].startswith("--"):
        arguments = arguments[1:]
    return arguments


def _taken(name: str) -> bool:
    """Removes a file from the folder; returns whether it was there."""
    try:
        (FOLDER / name).unlink()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))

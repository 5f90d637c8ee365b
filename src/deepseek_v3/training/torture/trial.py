"""One trial: a fault strikes a run, the run is started again, and everything that must hold is checked."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek_v3.training.torture.faults import LOG_FILES, TOKEN_FILES, Damage, Fault
from deepseek_v3.training.torture.strikes import CHECKPOINTS, FILLER, lost_tokens
from deepseek_v3.training.torture.tiny_run import STEPS, Undisturbed, final_state, losses_of
from deepseek_v3.training.torture.train_processes import Outcome, train_in
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory
from deepseek_v3.utils.checkpointing.sharded import verify_checkpoint
from deepseek_v3.utils.errors import CheckpointError, UserError

_DISK_MEGABYTES = 32


class BrokenPromiseError(Exception):
    """Something that must hold after a fault does not."""


@dataclass(frozen=True)
class Trial:
    """A fault that was tried: how long that took, and what did not hold, or None if the run survived."""

    fault: Fault
    seconds: float
    problem: str | None


def run_trial(fault: Fault, undisturbed: Undisturbed, folder: Path) -> Trial:
    """Tries a fault in the new folder `folder`."""
    start, problem = time.perf_counter(), None
    with small_disk(folder, wanted=fault.strike == "fill"):
        origin = undisturbed.stopped if fault.damage else undisturbed.fresh
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        try:
            _strike_and_resume(fault, undisturbed, folder)
        except (BrokenPromiseError, UserError) as error:
            problem = str(error)
    return Trial(fault, time.perf_counter() - start, problem)


@contextmanager
def small_disk(folder: Path, wanted: bool = True) -> Iterator[bool]:
    """Makes `folder` a small disk of its own, if that is wanted and this process may mount one; yields whether."""
    folder.mkdir(parents=True)
    command = ("mount", "-t", "tmpfs", "-o", f"size={_DISK_MEGABYTES}m", "torture", str(folder))
    mounted = False
    if wanted:
        with suppress(OSError):
            mounted = _run(*command)
    try:
        yield mounted
    finally:
        if mounted:
            _run("umount", "--lazy", str(folder))


def _run(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0  # noqa: S603 -- our own words


def good_steps(folder: Path) -> set[int]:
    """The steps of the run's checkpoints whose checksums hold."""
    found = set()
    for path in CheckpointDirectory(folder / CHECKPOINTS, keep=1).newest_first():
        with suppress(CheckpointError):
            verify_checkpoint(path, None)
            found.add(int(path.stem.rpartition("_")[2]))
    return found


def damage_file(path: Path, damage: Damage, position: float) -> None:
    """Cuts a file short, flips one bit, or removes it; `position` is the share of its bytes before the damage.

    A file of no bytes can only be removed, and is.
    """
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    if damage == "remove" or not content:
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << place % 8
        path.write_bytes(content)


def _strike_and_resume(fault: Fault, undisturbed: Undisturbed, folder: Path) -> None:
    originals = _damage(fault, folder) if fault.damage else {}
    if fault.strike is not None:
        before = good_steps(folder)
        outcome = train_in(folder, fault.ranks, fault)
        check_end(fault, outcome)
        check_kept(before | set(outcome.saved), folder)
        _repair(folder)
        if fault.strike == "lose and kill":
            lost = lost_tokens(undisturbed.fresh)
            originals[lost_tokens(folder)] = lost.read_bytes()
        elif fault.strike == "lose":
            shutil.copy2(lost_tokens(undisturbed.fresh), lost_tokens(folder))
    if fault.file in TOKEN_FILES or fault.strike == "lose and kill":
        _check_refusal(train_in(folder, fault.ranks), originals, folder)
    good = good_steps(folder)
    outcome = train_in(folder, fault.ranks)
    check_resumed(outcome, good)
    _check_final(fault, undisturbed, folder, max(good, default=0))


def _damage(fault: Fault, folder: Path) -> dict[Path, bytes]:
    """Damages one file of the run; returns its path and its previous bytes."""
    assert fault.damage is not None
    newest = CheckpointDirectory(folder / CHECKPOINTS, keep=1).newest_first()[0]
    paths = sorted(folder.glob(fault.file.format(newest=newest.stem)))
    path = paths[int(fault.position * len(paths))]
    original = path.read_bytes()
    damage_file(path, fault.damage, fault.position)
    return {path: original}


def check_end(fault: Fault, outcome: Outcome) -> None:
    """The struck process, and the other rank, must end as this fault makes them end."""
    struck, others = outcome.codes[fault.rank], [c for rank, c in enumerate(outcome.codes) if rank != fault.rank]
    expected = {
        "kill": (-signal.SIGKILL,),
        "lose and kill": (-signal.SIGKILL,),
        "terminate": (-signal.SIGTERM, 0),
        "fill": (1,),
        "forbid": (1,),
        "stop": (None,),
        "hang": (None, 1),
    }.get(str(fault.strike), (0,))
    if struck not in expected:
        wanted = " or ".join(map(str, expected))
        raise BrokenPromiseError(f"rank {fault.rank} ended with {struck}, expected {wanted}: {outcome.last_line}")
    if any(code != 1 for code in others):
        raise BrokenPromiseError(f"the other rank ended with {others[0]}, expected 1: {outcome.last_line}")
    if fault.strike in ("fill", "forbid") and "cannot be written" not in outcome.last_line:
        raise BrokenPromiseError(f"the error does not say what cannot be written: {outcome.last_line}")
    if fault.ends_in_a_stall and f"rank {fault.rank}" not in outcome.text:
        raise BrokenPromiseError(f"no message names rank {fault.rank}: {outcome.last_line}")


def check_kept(committed: set[int], folder: Path) -> None:
    """The newest checkpoint that was ever complete must still be there, and be good."""
    good = good_steps(folder)
    if committed and max(committed) > max(good, default=0):
        raise BrokenPromiseError(f"step {max(committed)} was saved, and the good checkpoints are {sorted(good)}")


def _repair(folder: Path) -> None:
    """Makes room, and gives the permission to write, as an operator would."""
    (folder / FILLER).unlink(missing_ok=True)
    if (folder / CHECKPOINTS).exists():
        (folder / CHECKPOINTS).chmod(0o755)


def _check_refusal(outcome: Outcome, originals: dict[Path, bytes], folder: Path) -> None:
    """A run without its data must say so in one line, and lose no checkpoint; then gives it the data back."""
    (path, original), good = next(iter(originals.items())), good_steps(folder)
    if set(outcome.codes) != {1} or not outcome.last_line.startswith("error: "):
        raise BrokenPromiseError(
            f"a run with a damaged {path.name} ended with {outcome.codes}: {outcome.last_line}"
        )
    if "tokens" not in outcome.last_line:
        raise BrokenPromiseError(f"the error does not name the tokens: {outcome.last_line}")
    path.write_bytes(original)
    check_kept(good, folder)


def check_resumed(outcome: Outcome, good: set[int]) -> None:
    """The run must go on from the newest good checkpoint, so that no damaged one was loaded, and end well."""
    if not outcome.succeeded:
        raise BrokenPromiseError(f"the run that resumed ended with {outcome.codes}: {outcome.last_line}")
    if outcome.resumed != max(good, default=0):
        raise BrokenPromiseError(
            f"the run went on after step {outcome.resumed}, and the good ones were {sorted(good)}"
        )


def _check_final(fault: Fault, undisturbed: Undisturbed, folder: Path, resumed: int) -> None:
    """The last checkpoint must equal that of the undisturbed run bit for bit, and so must the losses."""
    (tensors, plain), (expected, expected_plain) = final_state(folder), undisturbed.final
    if tensors.keys() != expected.keys():
        raise BrokenPromiseError("the last checkpoint has other tensors")
    different = [name for name, tensor in tensors.items() if not tensor.equal(expected[name])]
    if different:
        raise BrokenPromiseError(f"{len(different)} of {len(tensors)} tensors differ, the first is {different[0]}")
    if plain != expected_plain:
        raise BrokenPromiseError("the last checkpoint has other plain values")
    first = resumed + 1 if fault.file in LOG_FILES else 1
    losses = losses_of(folder)
    if any(losses.get(step) != undisturbed.losses[step] for step in range(first, STEPS + 1)):
        raise BrokenPromiseError("metrics.jsonl has other losses")

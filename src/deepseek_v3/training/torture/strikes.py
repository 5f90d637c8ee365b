"""What a struck process does to itself, at the exact place where the fault is to happen."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from deepseek_v3.training.torture.faults import Fault
from deepseek_v3.utils.fault_points import Place

PLACES_FILE = "places.{rank}.txt"
FILLER = Path("filler")
CHECKPOINTS, TOKENS = Path("checkpoints"), Path("tokens")
_ROOM_BYTES = 20_000  # left on a full disk: the beginning of a checkpoint fits
_CAPABILITY_VERSION, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2  # linux/capability.h


class Striker:
    """Strikes the process of `rank` when it reaches the fault's place for the fault's time.

    Without a fault it writes every place that is reached to `places.RANK.txt` in the working directory.
    """

    def __init__(self, fault: Fault | None, rank: int) -> None:
        self._fault, self._rank = fault, rank
        self._counts: Counter[Place] = Counter()

    def __call__(self, place: Place) -> None:
        """Called at every place. Raises the OSError of a full disk at every save after that was injected."""
        self._counts[place] += 1
        fault = self._fault
        if fault is None:
            with Path(PLACES_FILE.format(rank=self._rank)).open("a") as file:
                file.write(f"{place}\n")
        elif fault.strike is not None and fault.rank == self._rank:
            if (fault.place, fault.hit) == (place, self._counts[place]):
                _STRIKES[fault.strike]()
            if place == "save" and FILLER.exists() and not Path.cwd().is_mount():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def obey_permissions() -> None:
    """Lets the kernel check permissions of files even for root, on Linux; every later thread inherits this."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the low and the high capabilities
    if libc.capget(header, sets) == 0:
        sets[0] &= ~((1 << _DAC_OVERRIDE) | (1 << _DAC_READ_SEARCH))
        libc.capset(header, sets)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def _pause() -> None:
    """Stops this process until a helper continues it, which tries until the process has ended."""
    loop = f"while sleep 0.3; kill -CONT {os.getpid()}; do :; done"
    subprocess.Popen(["/bin/sh", "-c", loop], stderr=subprocess.DEVNULL)  # noqa: S603 -- our own words
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _fill() -> None:
    """Fills the disk, if it is the small one of this trial; otherwise every later save fails, as `Striker` says."""
    if not Path.cwd().is_mount():
        FILLER.touch()
        return
    with FILLER.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            file.truncate(max(0, file.tell() - _ROOM_BYTES))


def lost_tokens(folder: Path) -> Path:
    """The token file of the run in `folder` that vanishes."""
    return folder / TOKENS / "train" / "00000.bin"


def _forbid() -> None:
    CHECKPOINTS.mkdir(exist_ok=True)
    CHECKPOINTS.chmod(0o555)


def _lose() -> None:
    lost_tokens(Path()).unlink()


def _lose_and_kill() -> None:
    _lose()
    _kill()


_STRIKES: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "terminate": _terminate,
    "pause": _pause,
    "stop": _stop,
    "hang": _hang,
    "fill": _fill,
    "forbid": _forbid,
    "lose": _lose,
    "lose and kill": _lose_and_kill,
}

"""Locks on folders, which let one process at a time use a folder. A lock ends with its process.

The kernel drops a `flock` when its process dies, but some network file systems do not show the lock to other hosts,
and some have no locks. The lock file therefore also names its owner, which touches the file every few seconds. If
the kernel cannot tell whether the owner is alive, the time of the last touch decides.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from deepseek_v3.utils.errors import DataError, InUseError
from deepseek_v3.utils.files import refuse_address
from deepseek_v3.utils.logging import get_logger

_TOUCH_SECONDS = 10.0
_SILENCE_SECONDS = 60.0  # after which an owner on another host counts as dead
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from file systems without flock
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_SYNC  # O_SYNC: other hosts must see the owner at once
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COMMAND_CHARACTERS = 200

_log = get_logger("Lock")


class _Owner(NamedTuple):
    """The process that holds a lock. `kernel` identifies one boot of one machine, which its containers share."""

    host: str
    kernel: str
    pid: int
    command: str

    @property
    def described(self) -> str:
        return f"process {self.pid} on host {self.host}: {self.command}"


@contextmanager
def hold_lock(path: Path, subject: Path, advice: str, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock file `path` while entered; creates its folder, and removes it afterwards if it is empty.

    Messages name `subject`, which the lock protects, and end with `advice`, an alternative for the user. A `shared`
    lock excludes only locks that are not shared. The lock of a process that has died is taken over. Raises
    InUseError if another process has the lock, and DataError if the file cannot be written.
    """
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        refuse_address(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, subject, advice, shared)
    except OSError as error:
        _remove_empty(created)
        raise DataError(f"{subject}: cannot be written: {error.strerror}; {advice}") from error
    except InUseError:
        _remove_empty(created)
        raise
    released = threading.Event()
    toucher = threading.Thread(target=_touch, args=(descriptor, released), name="lock", daemon=True)
    toucher.start()
    try:
        yield
    finally:
        released.set()
        toucher.join()
        if not shared or _is_last_holder(descriptor):
            with suppress(OSError):  # the error of a folder that became read-only is that of the work in it
                path.unlink()
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also releases it in worker processes forked under the lock
        os.close(descriptor)
        _remove_empty(created)


def _acquire(path: Path, subject: Path, advice: str, shared: bool) -> int:
    """Opens and locks the lock file and, unless `shared`, writes this process into it; returns its descriptor."""
    while True:
        descriptor = os.open(path, _OPEN, 0o644)
        try:
            granted = _flock(descriptor, path, subject, advice, shared)
            if _is_open_file(path, descriptor):
                _check_owner(descriptor, path, subject, advice, granted)
                if not shared:
                    _write_owner(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the owner removed this file before the lock was granted: try again with a new one


def _flock(descriptor: int, path: Path, subject: Path, advice: str, shared: bool) -> bool:
    """Locks a file; returns False if the file system has no locks. Raises InUseError if another process has it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(subject, _read_owner(path), advice) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_last_holder(descriptor: int) -> bool:
    """Whether no other process holds a shared lock on the file; the lock of this process may become exclusive."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Whether the file at `path` is the file that `descriptor` has open, and not a newer one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_owner(descriptor: int, path: Path, subject: Path, advice: str, granted: bool) -> None:
    """Raises InUseError if the owner that the file names may be alive.

    `granted` means that the file system has locks and granted this one, so no process of this kernel holds it.
    """
    owner = _read_owner(path)
    if owner is None:
        return
    known_dead = granted and owner.kernel == _kernel()
    if not known_dead and _silence(descriptor, path.parent) < _SILENCE_SECONDS:
        raise _in_use(subject, owner, advice)
    os.ftruncate(descriptor, 0)
    _log.info(f"{subject}: took over the lock of a process that has died ({owner.described})")


def _in_use(subject: Path, owner: _Owner | None, advice: str) -> InUseError:
    who = f" ({owner.described})" if owner else ""
    elsewhere = ""
    if owner and owner.kernel != _kernel():
        elsewhere = f"; if it has died, start again {_SILENCE_SECONDS:.0f} s after that"
    return InUseError(
        f"{subject}: another process works on this run{who}; wait for it, or stop it{elsewhere}; or {advice}"
    )


def _read_owner(path: Path) -> _Owner | None:
    """The owner in the lock file; None if there is none, or the last owner died while writing it."""
    try:
        return _Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write_owner(descriptor: int, path: Path) -> None:
    command = shlex.join(sys.argv)[:_COMMAND_CHARACTERS]
    owner = _Owner(socket.gethostname(), _kernel(), os.getpid(), command)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner._asdict()).encode(), 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _silence(descriptor: int, folder: Path) -> float:
    """Seconds since the lock file was touched, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _touch(descriptor: int, released: threading.Event) -> None:
    while not released.wait(_TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)


def _kernel() -> str:
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else socket.gethostname()


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of `folders` that are empty; `folders` lists inner folders first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()

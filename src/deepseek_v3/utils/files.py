"""Files that are complete or invisible, and the checksums that prove it.

FOLDED: Checkpoint folders that are complete or invisible: whatever is not, or is going away, has a hidden name.

`.checkpoint_step_<N>.partial` is being written, `.checkpoint_step_<N>.outdated` is being deleted, and
`.checkpoint_step_<N>.replaced` is complete until the one that replaces it has its name. A program that is killed
meanwhile leaves no more than that, and no step is lost: `remove_leftovers` gives a replaced folder its name back
where the new one never got it.

"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from deepseek_v3.utils.redaction import redact

_CHUNK_BYTES = 1 << 22


def unused_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist yet."""
    later = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(found for found in chain([path], later) if not found.exists() and not found.is_symlink())


def read_regular_file(path: Path, most_bytes: int, expected: str) -> bytes:
    """All bytes of a regular file, or of a link to one.

    Raises ValueError with the reason and what was `expected`, but without the path: it cannot be read, is a folder,
    a pipe or a device, or has more than `most_bytes` bytes. It never waits, and reads at most one byte too many.
    """
    if "\0" in str(path):
        raise ValueError(f"cannot be read: its name holds a NUL character; expected {expected}")
    try:
        # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"is a {_kind(mode)}, expected {expected}")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(most_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}; expected {expected}") from None
    except MemoryError:
        raise ValueError(f"cannot be read: it does not fit this machine's memory; expected {expected}") from None
    if len(data) > most_bytes:
        raise ValueError(f"has more than {most_bytes:,} bytes, expected {expected}")
    return data


def _kind(mode: int) -> str:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, matches in kinds.items() if matches(mode)), "device")


def is_address(text: str) -> bool:
    """Whether a text is an address such as `s3://bucket/x`, also after Path() made one slash of two."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def refuse_address(path: Path) -> None:
    """Raises OSError for `s3://bucket/x` and the like, which would become a folder of that name here."""
    if is_address(str(path)):
        raise OSError(errno.EINVAL, "is an address, expected a path of this machine", redact(str(path)))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success the file is fsynced and renamed to `path`.

    On an exception nothing appears at `path`, and the partial file is removed. Raises OSError where `path` is a
    folder, a pipe or a device, which a rename would replace, or an address.
    """
    refuse_address(path)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 -- False for names too long
        raise FileExistsError(errno.EEXIST, "is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where this process writes what is going to be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Removes what processes that were killed have left half written of the file or folder `path`.

    The caller holds the lock under which `path` is written. Files that cannot be removed stay.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.partial")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if ours.fullmatch(entry.name):
            remove_entry(entry)


def remove_entry(path: Path) -> None:
    """Removes a file or a folder with all that is in it, as far as the file system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def fsync_directory(directory: Path) -> None:
    """Makes a rename inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path, num_bytes: int | None = None) -> str:
    """SHA-256, in hexadecimal, of the first `num_bytes` bytes of a file, or of all of it."""
    digest = hashlib.sha256()
    left = path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


_HIDDEN = re.compile(
    r"\.(?P<name>checkpoint_step_[0-9]+)\.(?P<state>partial|outdated|replaced)"
    r"|\.checkpoint_step_[0-9]+\.pt\.[0-9]+\.partial"  # of a process that wrote a file
)


def partial_folder(folder: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return _hidden(folder, "partial")


def publish_folder(folder: Path) -> None:
    """Gives `partial_folder(folder)`, whose files are fsynced, its name; an earlier `folder` goes away."""
    partial, replaced = partial_folder(folder), _hidden(folder, "replaced")
    fsync_directory(partial)
    if folder.is_dir():
        folder.rename(replaced)
    partial.rename(folder)
    fsync_directory(folder.parent)
    if replaced.is_dir():
        _delete(replaced, folder)


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if there is one, that is never seen half deleted."""
    if folder.is_dir():
        _delete(folder, folder)


def remove_leftovers(directory: Path) -> None:
    """Tidies up what killed programs left half written, half deleted or half replaced among checkpoints.

    The caller holds the run's lock. Raises OSError where a replaced folder cannot have its name back.
    """
    left = [(entry, match) for entry in directory.iterdir() if (match := _HIDDEN.fullmatch(entry.name))]
    for entry, match in left:
        if entry.is_dir() != bool(match["state"]):
            continue  # a file under the name of a folder, or the other way round, is none of ours
        if match["state"] == "replaced" and not (folder := directory / match["name"]).exists():
            entry.rename(folder)
            fsync_directory(directory)
        elif match["state"] == "replaced":
            _delete(entry, folder)
        else:
            remove_entry(entry)


def _delete(entry: Path, folder: Path) -> None:
    """Deletes the folder `entry` under the hidden name of what is being deleted of `folder`."""
    outdated = _hidden(folder, "outdated")
    remove_entry(outdated)
    entry.rename(outdated)
    shutil.rmtree(outdated)


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")

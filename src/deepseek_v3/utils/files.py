"""Writes files and folders that are complete or invisible, computes checksums, and checks paths.

A file or folder that is not complete has a hidden name beside the final one. One process writes
`.NAME.<pid or random>.partial`. The ranks of a job write a checkpoint folder together, under names that all ranks
know: `.checkpoint_step_<N>.partial` is being written, `.checkpoint_step_<N>.outdated` is being deleted, and
`.checkpoint_step_<N>.replaced` stays complete until its replacement has the final name. A killed program leaves
nothing else behind and loses no checkpoint: `remove_leftovers` gives a replaced folder its name back if there is no
new one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.redaction import redact

_CHUNK_BYTES = 1 << 22
_HIDDEN = re.compile(
    r"\.(?P<name>checkpoint_step_[0-9]+)\.(?P<state>partial|outdated|replaced)"
    r"|\.checkpoint_step_[0-9]+\.pt\.[0-9]+\.partial"  # a checkpoint file
)


def unused_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist."""
    later = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(found for found in chain([path], later) if not found.exists() and not found.is_symlink())


def read_regular_file(path: Path, max_bytes: int, expected: str) -> bytes:
    """Returns all bytes of a regular file, or of a link to one.

    Raises ValueError, with the reason and `expected` but without the path, for a file that cannot be read, for a
    folder, a pipe or a device, and for more than `max_bytes` bytes. Never waits, and reads at most `max_bytes` + 1
    bytes.
    """
    if "\0" in str(path):
        raise ValueError(f"cannot be read: its name holds a NUL character; expected {expected}")
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"is a {_kind(mode)}, expected {expected}")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}; expected {expected}") from None
    except MemoryError:
        raise ValueError(f"cannot be read: it does not fit this machine's memory; expected {expected}") from None
    if len(data) > max_bytes:
        raise ValueError(f"has more than {max_bytes:,} bytes, expected {expected}")
    return data


def _kind(mode: int) -> str:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, matches in kinds.items() if matches(mode)), "device")


def is_address(text: str) -> bool:
    """Whether a text is an address such as `s3://bucket/x`, even after Path() turned `//` into `/`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def refuse_address(path: Path) -> None:
    """Raises OSError for an address such as `s3://bucket/x`, which would become a local folder of that name."""
    if is_address(str(path)):
        raise OSError(errno.EINVAL, "is an address, expected a path of this machine", redact(str(path)))


def sha256_of_file(path: Path, num_bytes: int | None = None) -> str:
    """SHA-256, in hexadecimal, of the first `num_bytes` bytes of a file, or of the whole file."""
    digest = hashlib.sha256()
    left = path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to; on success that is fsynced and renamed to `path`.

    On an exception, removes the partial file and leaves `path` unchanged. Raises OSError if `path` is an address,
    or a folder, a pipe or a device, which a rename would replace.
    """
    refuse_address(path)
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 -- False for names too long
        raise FileExistsError(errno.EEXIST, "is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        reach("rename")
        partial.replace(path)
        reach("renamed")
        fsync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def new_file_problem(path: Path) -> str | None:
    """Why a new file cannot be written at `path`, to say before long work; None if nothing speaks against it."""
    if os.path.lexists(path):
        return "exists and is left as it is; choose a new file"
    return _folder_problem(path)


def output_file_problem(path: Path) -> str | None:
    """Why no file can be written at `path`, in place of one that is there, to say before long work; else None."""
    if os.path.lexists(path) and not path.is_file():
        return "is no regular file; choose another file"
    return _folder_problem(path)


def _folder_problem(path: Path) -> str | None:
    """Why nothing can be added to the folder of `path`, or to the nearest one above it that exists; else None."""
    if is_address(str(path)):
        return "is an address, expected a path of this machine; choose another file"
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        return f"cannot be written: {folder} is no folder; choose another file"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot be written: nothing can be added to {folder}; choose another file"
    return None


@contextmanager
def atomic_folder(folder: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `folder` to fill; on success it is renamed to `folder`, otherwise removed.

    If `folder` exists by then and is not empty, raises OSError; with `keep_existing`, keeps the existing folder
    instead, because another process may have done the same work.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not (keep_existing and folder.is_dir()):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 and fsyncs it, for a folder that appears when it is complete."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def partial_path(path: Path) -> Path:
    """The path at which this process writes the file that will be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Removes the partial files and folders of `path` that killed processes have left.

    The caller holds the lock under which `path` is written. Entries that cannot be removed stay.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.partial")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if ours.fullmatch(entry.name):
            remove_entry(entry)


def remove_entry(path: Path) -> None:
    """Removes a file, or a folder with its contents, as far as the file system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def fsync_directory(directory: Path) -> None:
    """Fsyncs a directory, so that a rename inside it survives a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_folder(folder: Path) -> Path:
    """The path at which the ranks write the checkpoint folder that will be `folder`."""
    return _hidden(folder, "partial")


def publish_folder(folder: Path) -> None:
    """Renames `partial_folder(folder)`, whose files are fsynced, to `folder`; removes a previous `folder`."""
    partial, replaced = partial_folder(folder), _hidden(folder, "replaced")
    fsync_directory(partial)
    if folder.is_dir():
        folder.rename(replaced)
    reach("rename")
    partial.rename(folder)
    reach("renamed")
    fsync_directory(folder.parent)
    if replaced.is_dir():
        _delete(replaced, folder)


def remove_folder(folder: Path) -> None:
    """Deletes a checkpoint folder, if it exists, so that it is never visible half deleted."""
    if folder.is_dir():
        _delete(folder, folder)


def remove_leftovers(directory: Path) -> None:
    """Removes the checkpoints that killed programs left half written, half deleted or half replaced.

    The caller holds the run's lock. Raises OSError if a replaced folder cannot be given its name back.
    """
    left = [(entry, match) for entry in directory.iterdir() if (match := _HIDDEN.fullmatch(entry.name))]
    for entry, match in left:
        if entry.is_dir() != bool(match["state"]):
            continue  # not written by this project: a file with a folder's name, or a folder with a file's name
        if match["state"] == "replaced" and not (folder := directory / match["name"]).exists():
            entry.rename(folder)
            fsync_directory(directory)
        elif match["state"] == "replaced":
            _delete(entry, folder)
        else:
            remove_entry(entry)


def _delete(entry: Path, folder: Path) -> None:
    """Renames the folder `entry` to `.<name of folder>.outdated`, then deletes it."""
    outdated = _hidden(folder, "outdated")
    remove_entry(outdated)
    entry.rename(outdated)
    reach("remove")
    shutil.rmtree(outdated)


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")

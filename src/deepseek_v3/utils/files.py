"""Files that are complete or invisible, and the checksums that prove it."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

_CHUNK_BYTES = 1 << 22


def unused_path(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist yet."""
    later = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(found for found in chain([path], later) if not found.exists() and not found.is_symlink())


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success the file is fsynced and renamed to `path`.

    On an exception nothing appears at `path`, and the partial file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where this process writes what is going to be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Removes what processes that were killed have left half written of the file or folder `path`.

    For whoever holds the lock under which `path` is written. What cannot be removed is left.
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


def sync_directory(directory: Path) -> None:
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

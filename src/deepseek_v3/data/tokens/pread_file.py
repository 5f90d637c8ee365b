"""A file that several threads read at any position."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from deepseek_v3.utils.errors import DataError


class PreadFile:
    """Reads a file of known size at any position, from any thread; it is closed with the last reference.

    The file is read, not memory-mapped: if a mapped file becomes shorter, SIGBUS kills the process without a
    message. Raises DataError if the file cannot be opened, or if its size is not `num_bytes` (None: any size).
    Messages end with `remedy`.
    """

    def __init__(self, path: Path, num_bytes: int | None, remedy: str) -> None:
        self._path, self._remedy = path, remedy
        self._descriptor = -1
        try:
            # Without O_NONBLOCK, opening a pipe waits for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise self._unreadable(error) from None
        self.num_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: is not a regular file; {remedy}")
        if num_bytes is not None and self.num_bytes != num_bytes:
            raise DataError(f"{path}: holds {self.num_bytes} bytes, expected {num_bytes}; {remedy}")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes `start` to `start + num_bytes`. Raises DataError if they cannot be read or the file is shorter."""
        try:
            data = os.pread(self._descriptor, num_bytes, start)
            while len(data) < num_bytes:  # a call reads at most 2 GiB
                more = os.pread(self._descriptor, num_bytes - len(data), start + len(data))
                if not more:
                    size = os.fstat(self._descriptor).st_size
                    raise DataError(
                        f"{self._path}: has become shorter while it was in use: it holds {size} bytes, expected at "
                        f"least {start + num_bytes}; {self._remedy}"
                    )
                data += more
        except OSError as error:
            raise self._unreadable(error) from None
        return data

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: can no longer be read: {error.strerror}; {self._remedy}")

"""A file as the stream of its decompressed bytes, wherever it lies and however it is damaged."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import fsspec

from deepseek_v3.data.formats.decompression import Decompressor
from deepseek_v3.data.formats.inputs import InputFile
from deepseek_v3.data.formats.quarantine import Rejected
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.secrets import masked

_SKIP_BYTES = 2**20


def open_raw(file: InputFile) -> BinaryIO:
    """Opens a file as it is stored. Raises OSError."""
    if file.is_remote:
        try:
            return cast(BinaryIO, fsspec.open(file.path, "rb").open())
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- each store's library has errors of its own
            raise _unanswered(file, error) from None
    return Path(file.path).open("rb")


def unreadable(file: InputFile, error: OSError) -> Rejected:
    """The entry for a file that the disk or the store does not give.

    Raises DataError instead where a store fails otherwise than by refusing the file: that may be over by and by.
    """
    if file.is_remote and not isinstance(error, (FileNotFoundError, PermissionError)):
        raise _unanswered(file, error) from None
    return Rejected("unreadable", masked(f"cannot be read: {error.strerror or error}", file.path))


def _unanswered(file: InputFile, error: Exception) -> DataError:
    problem = f"{file.path}: cannot be read: {error}; start again once the store answers"
    return DataError(masked(problem, file.path))


class ByteStream:
    """The decompressed bytes of a file, from byte `start` on, inside a `with` block.

    Where the file is damaged the stream ends before the damage, which `damage` then names.
    """

    def __init__(self, file: InputFile, start: int = 0) -> None:
        self.damage: Rejected | None = None
        self._file = file
        self._raw: BinaryIO | None = None
        self._decompressor: Decompressor | None = None
        self._held, self._at = b"", 0  # what was read of the file last, and how much of it was given
        compression = file.format.compression
        try:
            self._raw = open_raw(file)
            if compression:
                self._decompressor = Decompressor(self._raw, compression)
            else:
                self._raw.seek(start)
        except OSError as error:
            self.damage = unreadable(file, error)
        if self._decompressor:
            self._skip(start)

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._raw is not None:
            self._raw.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        missing = self._at + size - len(self._held)
        if missing > 0:
            parts = [self._held[self._at :]] if self._at < len(self._held) else []
            while missing > 0 and (piece := self._next(missing)):
                parts.append(piece)
                missing -= len(piece)
            self._held, self._at = b"".join(parts), 0
        data = self._held[self._at : self._at + size]
        self._at += len(data)
        return data

    def unread(self, count: int) -> None:
        """Goes back `count` bytes of what was read last."""
        self._at -= count

    def _skip(self, size: int) -> None:
        while size > 0 and (data := self.read(min(size, _SKIP_BYTES))):
            size -= len(data)

    def _next(self, size: int) -> bytes:
        if self._raw is None or self.damage:
            return b""
        try:
            return self._decompressor.next_piece() if self._decompressor else self._raw.read(size)
        except OSError as error:
            self.damage = unreadable(self._file, error)
        except Rejected as damage:
            self.damage = damage
            if damage.reason == "damaged" and self._decompressor:
                with open_raw(self._file) as raw:
                    return self._decompressor.rest_before_damage(raw)
        except Exception as error:
            if not self._file.is_remote:
                raise
            raise _unanswered(self._file, error) from None
        return b""
